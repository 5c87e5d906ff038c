"""Tell scanned handwritten digits apart: 1,797 images of 8 x 8 pixels, which come with scikit-learn.

One process, as many as `accelerate config` was told, or two on a CPU, which share each batch of 32:

    python examples/digits.py
    accelerate launch examples/digits.py
    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/digits.py --per-device-batch-size 16

The results are the same but for rounding. `digits_plain.py` beside this does the training by hand.
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
    # No batch norm and no dropout: what an image adds to the gradient depends on no other image of its batch.
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
    """Return 1,257 digits to train on, 180 to validate with and 360 to test with: always the same ones."""
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.to(dtype).view(-1, 1, 8, 8) / 16
    rest, test = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, test_size=180, stratify=labels[rest], random_state=0)
    return [TensorDataset(images[part], labels[part]) for part in (train, validation, test)]


def draw(history: RunHistory, mistakes: list[tuple[Tensor, Tensor, Tensor]], path: Path) -> None:
    """Draw the curves, and up to nine digits that were taken for others: images, labels and what they were read as."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    axes = figure.subplot_mosaic("LLLLAAAA012;LLLLAAAA345;LLLLAAAA678")
    epochs, rows = [record.epoch for record in history], [record.values() for record in history]
    for panel, name, label, colour in (
        ("L", "train_loss", "training (smoothed labels)", "tab:blue"),
        ("L", "eval_loss", "validation", "tab:orange"),
        ("A", "accuracy", "validation", "tab:orange"),
    ):
        axes[panel].plot(epochs, [row[name] for row in rows], ".-", label=label, color=colour)
        axes[panel].set(title={"L": "loss", "A": "accuracy"}[panel], xlabel="epoch")
        axes[panel].locator_params(axis="x", integer=True)
        axes[panel].grid(alpha=0.3)
        axes[panel].legend()

    for place in "012345678":
        axes[place].set_axis_off()
    for place, (image, digit, guess) in zip("012345678", mistakes, strict=False):
        axes[place].imshow(image[0].numpy(), cmap="gray_r")
        axes[place].set_title(f"{digit}, read as {guess}", fontsize="small")
    figure.suptitle(f"{len(mistakes)} test digits are read wrongly")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small net to tell scanned digits apart.")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--per-device-batch-size", type=int, default=32)
    parser.add_argument("--accumulate", type=int, default=1, help="batches of each process for one step")
    parser.add_argument("--mixed-precision", choices=["no", "fp16", "bf16"], help="as launched, if not given")
    parser.add_argument("--double", action="store_true", help="compute in float64")
    parser.add_argument("--history", type=Path, help="append every step and epoch to this file, as JSON lines")
    parser.add_argument("--out", type=Path, default=Path("digits.png"), help="where to draw curves and mistakes")
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
    guesses = [scores.argmax() for scores in trainer.predict(test, per_device_batch_size=64)]
    trainer.print(f"test: loss {result.loss:.4f}, accuracy {result.metrics['accuracy']:.2%} of {len(guesses)} digits")
    if trainer.accelerator.is_main_process:
        read = zip(*test.tensors, guesses, strict=False)
        draw(history, [(image, label, guess) for image, label, guess in read if guess != label], args.out)


if __name__ == "__main__":
    main()
