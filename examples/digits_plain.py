"""The training of `digits.py` in plain PyTorch: the same net, data, loss, schedule and table.

    python examples/digits_plain.py

It runs on one CPU or GPU, with seeds for the initial weights and the order of the data. It does not plot.
"""

import argparse
import contextlib
import math
import time
from collections.abc import Iterator
from itertools import islice

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

Batch = tuple[Tensor, ...]


def make_model() -> nn.Module:
    # Without batch norm and dropout, the gradient of an image does not depend on the other images of its batch.
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),  # (items, 32, 8, 8)
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),  # (items, 64, 4, 4)
        nn.Conv2d(64, 128, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),  # (items, 128, 2, 2)
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def load_data(dtype: torch.dtype) -> list[TensorDataset]:
    """Return 1,257 training, 180 validation and 360 test digits. The split is always the same."""
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.to(dtype).view(-1, 1, 8, 8) / 16
    rest, test = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, test_size=180, stratify=labels[rest], random_state=0)
    return [TensorDataset(images[part], labels[part]) for part in (train, validation, test)]


def windows(loader: DataLoader[Batch], accumulate: int) -> Iterator[list[Batch]]:
    """Yield the batches of each step. The last step of an epoch may have fewer."""
    batches = iter(loader)
    while window := list(islice(batches, accumulate)):
        yield window


def train(
    model: nn.Module,
    train_loader: DataLoader[Batch],
    validation_loader: DataLoader[Batch],
    *,
    epochs: int,
    accumulate: int = 1,
    bf16: bool = False,
) -> list[dict[str, float]]:
    """Train, print a table with one row per epoch, and return the rows."""
    device = next(model.parameters()).device
    optimizer = AdamW(model.parameters(), weight_decay=0.05)
    steps_per_epoch = math.ceil(len(train_loader) / accumulate)
    scheduler = OneCycleLR(optimizer, max_lr=3e-3, total_steps=epochs * steps_per_epoch)
    rows: list[dict[str, float]] = []
    for epoch in range(1, epochs + 1):
        started = time.monotonic()
        learning_rate = 0.0
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        norm_sum = torch.zeros((), dtype=torch.float64, device=device)
        items_seen = 0

        model.train()
        for window in windows(train_loader, accumulate):
            items = sum(len(labels) for _, labels in window)
            for images, labels in window:
                images, labels = images.to(device), labels.to(device)
                with autocast(device, enabled=bf16):
                    loss = cross_entropy(model(images), labels, label_smoothing=0.1)
                # Batches may differ in size, so the mean over the step is not the mean of the batch means.
                (loss * (len(labels) / items)).backward()  # type: ignore[no-untyped-call]
                loss_sum += loss.detach() * len(labels)
            norm_sum += nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
            learning_rate = float(scheduler.get_last_lr()[0])
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            items_seen += items

        eval_loss, accuracy = evaluate(model, validation_loader, bf16=bf16)
        row = {
            "epoch": epoch,
            "step": epoch * steps_per_epoch,
            "train_loss": float(loss_sum) / items_seen,
            "learning_rate": learning_rate,
            "grad_norm": float(norm_sum) / steps_per_epoch,
            "eval_loss": eval_loss,
            "accuracy": accuracy,
            "seconds": time.monotonic() - started,
        }
        if not rows:
            print("  ".join(f"{name:>10}" for name in row))
        print("  ".join(f"{value:{max(10, len(name))}.5g}" for name, value in row.items()))
        rows.append(row)
    return rows


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader[Batch], *, bf16: bool = False) -> tuple[float, float]:
    """Return the mean loss and the accuracy."""
    device = next(model.parameters()).device
    metric = MulticlassAccuracy(num_classes=10, average="micro").to(device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    items = 0
    model.eval()
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        with autocast(device, enabled=bf16):
            scores = model(images)
            loss_sum += cross_entropy(scores, labels, reduction="sum")
        metric.update(scores, labels)
        items += len(labels)
    return float(loss_sum) / items, float(metric.compute())


def autocast(device: torch.device, *, enabled: bool) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small convolutional net on scanned digits, in plain PyTorch.")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--double", action="store_true", help="compute in float64")
    args = parser.parse_args()

    dtype = torch.float64 if args.double else torch.float32
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_set, validation_set, test_set = load_data(dtype)
    torch.manual_seed(0)
    model = make_model().to(device, dtype)
    order = torch.Generator().manual_seed(0)
    train(
        model,
        DataLoader(train_set, batch_size=args.batch_size, shuffle=True, generator=order),
        DataLoader(validation_set, batch_size=args.batch_size),
        epochs=args.epochs,
        accumulate=args.accumulate,
        bf16=args.mixed_precision == "bf16",
    )
    loss, accuracy = evaluate(model, DataLoader(test_set, batch_size=64), bf16=args.mixed_precision == "bf16")
    print(f"test: loss {loss:.4f}, accuracy {accuracy:.2%} of {len(test_set)} digits")


if __name__ == "__main__":
    main()
