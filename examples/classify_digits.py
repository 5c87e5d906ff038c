"""Classify scanned digits with `ClassificationTrainer`: mixup and label smoothing, top-3 and per-class accuracy."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.optim import AdamW
from torch.utils.data import TensorDataset

from ptacc import GradClipMixin, LRSchedulerMixin, SeedMixin
from ptacc.schedules import warmup_cosine
from ptacc.trainers import ClassificationTrainer


class DigitsTrainer(SeedMixin, GradClipMixin, LRSchedulerMixin, ClassificationTrainer):
    pass


def load_data() -> list[TensorDataset]:
    """Return 1,437 training and 360 test images of 8 x 8 pixels."""
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    parts = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    return [TensorDataset(images[part], labels[part]) for part in parts]


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),  # (items, 32, 8, 8)
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),  # (items, 64, 4, 4)
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 10),
    )


def main() -> None:
    torch.manual_seed(0)
    train, test = load_data()
    model = make_model()
    trainer = DigitsTrainer(
        model,
        optimizer=AdamW(model.parameters(), lr=3e-3, weight_decay=0.05),
        create_scheduler=warmup_cosine(0.1),
        num_classes=10,
        label_smoothing=0.1,
        mixup_alpha=0.2,
        top_k=[3],
        per_class_accuracy=True,
        max_grad_norm=1.0,
        seed=0,
    )
    trainer.train(train, num_epochs=15, per_device_batch_size=64)
    metrics = trainer.evaluate(test).metrics
    trainer.print(f"hardest digit: {min(range(10), key=lambda digit: metrics[f'class_accuracy/{digit}'])}")
    trainer.print(f"accuracy: {metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
