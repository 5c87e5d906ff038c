"""Fine-tune by gradual unfreezing: a network for the digits 0 to 6 learns 7, 8 and 9 from five images of each."""

from collections import OrderedDict
from collections.abc import Mapping

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import TensorDataset

from ptacc import Epochs, FreezeMixin, LRSchedulerMixin, SeedMixin, Steps, gradual_unfreezing
from ptacc.protocols import SchedulerFactory
from ptacc.schedules import warmup_cosine
from ptacc.trainers import ClassificationTrainer

KNOWN = 7
NEW = 3


class DigitsTrainer(SeedMixin, FreezeMixin, LRSchedulerMixin, ClassificationTrainer):
    create_scheduler: SchedulerFactory = warmup_cosine(0.1)


def scatter(images: Tensor) -> Tensor:
    """Put each image `(1, 8, 8)` at a random place of a noisy one `(1, 16, 16)`."""
    scattered = 0.1 * torch.randn(len(images), 1, 16, 16).abs()
    for large, image in zip(scattered, images, strict=True):
        row, column = torch.randint(0, 9, (2,)).tolist()
        large[:, row : row + 8, column : column + 8] += image
    return scattered


def make_block(inputs: int, outputs: int) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))


def make_body() -> nn.Sequential:
    return nn.Sequential(
        make_block(1, 16),  # (items, 16, 8, 8)
        make_block(16, 32),
        make_block(32, 64),  # (items, 64, 2, 2)
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
    )


def train(
    body: nn.Module, data: TensorDataset, *, classes: int, epochs: int, unfreeze_at: Mapping[str, Epochs | Steps] = {}
) -> DigitsTrainer:
    """Train a body with a new head."""
    model = nn.Sequential(OrderedDict({"body": body, "head": nn.Linear(64, classes)}))
    optimizer = AdamW(model.parameters(), lr=3e-3)
    trainer = DigitsTrainer(model, optimizer=optimizer, num_classes=classes, unfreeze_at=unfreeze_at, seed=0)
    trainer.train(data, num_epochs=epochs)
    return trainer


def main() -> None:
    torch.manual_seed(0)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    is_known = labels < KNOWN
    known = TensorDataset(scatter(images[is_known].repeat(5, 1, 1, 1)), labels[is_known].repeat(5))
    new_images, new_labels = scatter(images[~is_known]), labels[~is_known] - KNOWN
    parts = train_test_split(range(len(new_labels)), train_size=5 * NEW, stratify=new_labels, random_state=0)
    few, test = (TensorDataset(new_images[part], new_labels[part]) for part in parts)

    body = make_body()
    train(body, known, classes=KNOWN, epochs=1)
    one_by_one = gradual_unfreezing(["body.0", "body.1", "body.2"], every=Epochs(5))
    tuned = train(body, few, classes=NEW, epochs=60, unfreeze_at=one_by_one)
    from_scratch = train(make_body(), few, classes=NEW, epochs=60)
    tuned.print(f"accuracy from scratch: {from_scratch.evaluate(test).metrics['accuracy']:.3f}")
    tuned.print(f"accuracy: {tuned.evaluate(test).metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
