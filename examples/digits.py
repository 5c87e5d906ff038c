"""Tell scanned handwritten digits apart: 1,797 pictures of 8 x 8 pixels, which come with scikit-learn.

python examples/digits.py                                                            # one process
accelerate launch examples/digits.py                                                 # as `accelerate config` has it
ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/digits.py --per-device-batch-size 16   # two, on a CPU

`digits_plain.py` does the same by hand.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from ptacc import (
    AMPMixin,
    GradAccumMixin,
    GradClipMixin,
    LRSchedulerMixin,
    MetricsMixin,
    RunHistory,
    RunPlan,
    SchedulerFactory,
    SeedMixin,
    Trainer,
)


def one_cycle(optimizer: Optimizer, plan: RunPlan) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=5e-3, total_steps=plan.total_steps)


class DigitsTrainer(SeedMixin, AMPMixin, GradAccumMixin, GradClipMixin, LRSchedulerMixin, MetricsMixin, Trainer):
    seed = 0
    max_grad_norm = 1.0
    create_scheduler: SchedulerFactory = one_cycle


def make_net() -> nn.Module:
    """Make a net for pictures `(items, 1, 8, 8)`; with no batch norm or dropout, how a batch is split changes nothing."""
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 2 * 2, 10),
    )


def load_splits(dtype: torch.dtype) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Return 1,257 digits to train on, 180 to validate and 360 to test: always the same, each class in proportion."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=dtype).unsqueeze(1)
    labels = torch.tensor(digits.target)
    rest, test = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, test_size=180, stratify=labels[rest], random_state=0)
    splits = [TensorDataset(images[part], labels[part]) for part in (train, validation, test)]
    return splits[0], splits[1], splits[2]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on scanned digits.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--per-device-batch-size", type=int, default=32)
    parser.add_argument("--accumulate", type=int, default=1, help="batches of each process for one step")
    parser.add_argument("--mixed-precision", choices=["no", "fp16", "bf16"], help="as launched, if not given")
    parser.add_argument("--double", action="store_true", help="compute in float64")
    parser.add_argument("--history", type=Path, help="append what steps and epochs report to this file, as JSON lines")
    parser.add_argument("--out", type=Path, default=Path("digits.png"), help="the picture to draw")
    args = parser.parse_args()

    dtype = torch.float64 if args.double else torch.float32
    train, validation, test = load_splits(dtype)
    torch.manual_seed(0)
    model = make_net().to(dtype)
    trainer = DigitsTrainer(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=AdamW(model.parameters(), weight_decay=0.05),
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.accumulate,
        metrics={"accuracy": MulticlassAccuracy(10, average="micro")},
        history_file=args.history,
    )
    history = trainer.train(
        train, validation, num_epochs=args.epochs, per_device_batch_size=args.per_device_batch_size
    )
    result = trainer.evaluate(test, per_device_batch_size=64)
    trainer.print(f"test: loss {result.loss:.4f}, accuracy {result.metrics['accuracy']:.2%} of {len(test)} digits")
    scores = torch.stack(list(trainer.predict(test, per_device_batch_size=64)))
    if trainer.accelerator.is_main_process:
        draw(history, test, scores.argmax(dim=1), args.out)


def draw(history: RunHistory, test: TensorDataset, predicted: Tensor, path: Path) -> None:
    pass


if __name__ == "__main__":
    main()
