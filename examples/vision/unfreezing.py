"""Fine-tune a ResNet of timm: first its head, and then its stages one after another, the last one first."""

import timm
import torch
from sklearn.datasets import load_digits
from timm.models import ResNet
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from ptacc import FreezeMixin, LRSchedulerMixin, MetricsMixin, SeedMixin, Trainer, gradual_unfreezing
from ptacc.protocols import SchedulerFactory
from ptacc.schedules import warmup_cosine

CLASSES = 5


class ImageTrainer(SeedMixin, LRSchedulerMixin, MetricsMixin, Trainer):
    create_scheduler: SchedulerFactory = warmup_cosine(0.1)


class FineTuner(FreezeMixin, ImageTrainer):
    pass


def load_data() -> tuple[TensorDataset, list[TensorDataset]]:
    """Return the digits 0 to 4 to train on first, and 300 of the digits 5 to 9 for fine-tuning, with a test set."""
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = v2.functional.resize(images.float().view(-1, 1, 8, 8) / 16, [32, 32])
    first, others = labels < CLASSES, torch.nonzero(labels >= CLASSES)[:, 0]
    parts = [TensorDataset(images[part], labels[part] - CLASSES) for part in (others[:300], others[300:])]
    return TensorDataset(images[first], labels[first]), parts


def main() -> None:
    torch.manual_seed(0)
    data, (train, test) = load_data()
    model = timm.create_model("test_resnet", in_chans=1, num_classes=CLASSES)
    assert isinstance(model, ResNet)
    loss = nn.CrossEntropyLoss()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    first = ImageTrainer(model, loss_func=loss, optimizer=optimizer, seed=0)
    first.train(data, num_epochs=4, per_device_batch_size=32)

    model.reset_classifier(CLASSES)
    trainer = FineTuner(
        model,
        loss_func=loss,
        optimizer=create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05),
        frozen=["conv1", "bn1"],
        unfreeze_at=gradual_unfreezing(["layer1", "layer2", "layer3", "layer4"]),
        metrics={"accuracy": MulticlassAccuracy(CLASSES)},
        seed=0,
    )
    history = trainer.train(train, test, num_epochs=8, per_device_batch_size=16)
    trainer.print(f"accuracy: {history[-1].metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
