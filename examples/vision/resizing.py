"""Train with larger and larger images, resized by the transforms of torchvision."""

from collections.abc import Sequence

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2
from typing_extensions import override

from ptacc import LRSchedulerMixin, MetricsMixin, SeedMixin, Trainer
from ptacc.schedules import warmup_cosine

SIZE = 32


class ResizingTrainer(SeedMixin, LRSchedulerMixin, MetricsMixin, Trainer):
    pass


class GrowingImages(Dataset[tuple[Tensor, Tensor]]):
    """Images that are moved at random, with a size for each epoch."""

    def __init__(self, images: Tensor, labels: Tensor, sizes: Sequence[int]) -> None:
        self.images, self.labels, self.sizes = images, labels, sizes
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Take the size of an epoch, which counts from 0. The trainer calls this when the epoch begins."""
        size = self.sizes[epoch]
        self.transform = v2.Compose([v2.Resize(size), v2.RandomAffine(degrees=[-10, 10], translate=(0.1, 0.1))])

    def __len__(self) -> int:
        return len(self.images)

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[index]), self.labels[index]


def main() -> None:
    torch.manual_seed(0)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    sizes = [16] * 4 + [24] * 3 + [SIZE] * 2
    train = GrowingImages(images[360:], labels[360:], sizes)
    test = TensorDataset(v2.functional.resize(images[:360], [SIZE, SIZE]), labels[:360])
    model = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    trainer = ResizingTrainer(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=AdamW(model.parameters(), lr=3e-3),
        create_scheduler=warmup_cosine(0.1),
        metrics={"accuracy": MulticlassAccuracy(10, average="micro")},
        seed=0,
    )
    history = trainer.train(train, test, num_epochs=len(sizes), per_device_batch_size=32)
    trainer.print(f"accuracy: {history[-1].metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
