"""Classify scanned handwritten digits: 1,797 images of 8 x 8 pixels from scikit-learn.

Run it on one process, on the processes set by `accelerate config`, or on two CPU processes that share each batch of 32:

    python examples/digits.py
    accelerate launch examples/digits.py
    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/digits.py --per-device-batch-size 16

The results are equal up to rounding. `digits_plain.py` does the same training in plain PyTorch.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from ptacc import (
    AMPMixin,
    GradAccumMixin,
    GradClipMixin,
    LRSchedulerMixin,
    MetricsMixin,
    RunHistory,
    RunPlan,
    SeedMixin,
    Trainer,
)


class DigitsTrainer(SeedMixin, AMPMixin, GradAccumMixin, GradClipMixin, LRSchedulerMixin, MetricsMixin, Trainer):
    label_smoothing: float = 0.0

    @override
    def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)


def one_cycle(optimizer: Optimizer, plan: RunPlan) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=3e-3, total_steps=plan.total_steps)


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


def plot(history: RunHistory, mistakes: list[tuple[Tensor, Tensor, Tensor]], path: Path) -> None:
    """Plot the curves and up to nine misclassified digits.

    Args:
        history: The history of the training.
        mistakes: Images, labels and predictions of the misclassified digits.
        path: The file to write.
    """
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    axes = figure.subplot_mosaic("LLLLAAAA012;LLLLAAAA345;LLLLAAAA678")
    epochs, rows = [record.epoch for record in history], [record.values() for record in history]
    for panel, name, label, color in (
        ("L", "train_loss", "training (smoothed labels)", "tab:blue"),
        ("L", "eval_loss", "validation", "tab:orange"),
        ("A", "accuracy", "validation", "tab:orange"),
    ):
        axes[panel].plot(epochs, [row[name] for row in rows], ".-", label=label, color=color)
        axes[panel].set(title={"L": "loss", "A": "accuracy"}[panel], xlabel="epoch")
        axes[panel].locator_params(axis="x", integer=True)
        axes[panel].grid(alpha=0.3)
        axes[panel].legend()

    for panel in "012345678":
        axes[panel].set_axis_off()
    for panel, (image, digit, prediction) in zip("012345678", mistakes, strict=False):
        axes[panel].imshow(image[0].numpy(), cmap="gray_r")
        axes[panel].set_title(f"{digit}, predicted {prediction}", fontsize="small")
    figure.suptitle(f"{len(mistakes)} misclassified test digits")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small convolutional net on scanned digits.")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the training data")
    parser.add_argument("--per-device-batch-size", type=int, default=32, help="batch size of one process")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step on each process")
    parser.add_argument("--mixed-precision", choices=["no", "fp16", "bf16"], help="default: as set by the launch")
    parser.add_argument("--double", action="store_true", help="compute in float64")
    parser.add_argument("--history", type=Path, help="append all steps and epochs to this JSON Lines file")
    parser.add_argument("--out", type=Path, default=Path("digits.png"), help="file for the plot of curves and errors")
    args = parser.parse_args()

    dtype = torch.float64 if args.double else torch.float32
    train, validation, test = load_data(dtype)
    torch.manual_seed(0)
    model = make_model().to(dtype)

    trainer = DigitsTrainer(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=AdamW(model.parameters(), weight_decay=0.05),
        create_scheduler=one_cycle,
        metrics={"accuracy": MulticlassAccuracy(num_classes=10, average="micro")},
        label_smoothing=0.1,
        max_grad_norm=1.0,
        gradient_accumulation_steps=args.accumulate,
        mixed_precision=args.mixed_precision,
        seed=0,
        history_file=args.history,
    )
    history = trainer.train(train, validation, num_epochs=args.epochs, per_device_batch_size=args.per_device_batch_size)
    result = trainer.evaluate(test, per_device_batch_size=64)
    predictions = [scores.argmax() for scores in trainer.predict(test, per_device_batch_size=64)]
    trainer.print(
        f"test: loss {result.loss:.4f}, accuracy {result.metrics['accuracy']:.2%} of {len(predictions)} digits"
    )
    if trainer.distributed.is_main:
        results = zip(*test.tensors, predictions, strict=False)
        mistakes = [(image, label, prediction) for image, label, prediction in results if prediction != label]
        plot(history, mistakes, args.out)


if __name__ == "__main__":
    main()
