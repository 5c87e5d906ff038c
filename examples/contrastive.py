"""Learn embeddings of digits without labels with `ContrastiveTrainer`. Neighbours among them classify the digits."""

import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import Dataset
from typing_extensions import override

from ptacc import LRSchedulerMixin, SeedMixin
from ptacc.schedules import warmup_cosine
from ptacc.trainers import ContrastiveTrainer


class Views(Dataset[tuple[Tensor, Tensor]]):
    """Two views of each image, which are other ones in each epoch."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return augment(self.images[index]), augment(self.images[index])


def augment(image: Tensor) -> Tensor:
    """Shift an image `(1, 8, 8)` by up to one pixel, change its contrast, and add noise."""
    row, column = torch.randint(0, 3, (2,)).tolist()
    shifted = nn.functional.pad(image, (1, 1, 1, 1))[:, row : row + 8, column : column + 8]
    return shifted * (0.7 + 0.6 * torch.rand(1)) + 0.15 * torch.randn_like(image)


class DigitsContrast(SeedMixin, LRSchedulerMixin, ContrastiveTrainer):
    pass


def main() -> None:
    torch.manual_seed(0)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    model = nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 32),
    )
    trainer = DigitsContrast(
        model,
        optimizer=AdamW(model.parameters(), lr=2e-3),
        create_scheduler=warmup_cosine(0.1),
        temperature=0.2,
        seed=0,
    )
    trainer.train(Views(images[360:]), num_epochs=20, per_device_batch_size=128)
    embeddings = torch.stack(trainer.predict(list(images))).cpu()  # (1797, 32)
    neighbours = KNeighborsClassifier(5).fit(embeddings[360:], labels[360:])
    trainer.print(f"accuracy: {neighbours.score(embeddings[:360], labels[:360]):.3f}")


if __name__ == "__main__":
    main()
