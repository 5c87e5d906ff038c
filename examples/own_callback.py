"""Write a callback: it ends the run once a value is reached, and keeps the gradient norms that were reported."""

from collections.abc import Mapping

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import AdamW
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import Callback, EpochRecord, GradClipMixin, SeedMixin, Steps, TrainerCore
from ptacc.trainers import ClassificationTrainer


class StopAt(Callback[TrainerCore]):
    """Ends the run after the epoch in which a value is reached.

    Args:
        name: The name of the value, such as `accuracy`.
        least: The value to reach.
    """

    def __init__(self, name: str, least: float) -> None:
        self.name, self.least = name, least

    @override
    def on_epoch_end(self, trainer: TrainerCore, record: EpochRecord) -> None:
        value = record.values()[self.name]
        if value >= self.least:
            trainer.stop(f"{self.name} is {value:.3f}")


class GradNorms(Callback[TrainerCore]):
    """Keeps the gradient norms that are reported, by step."""

    def __init__(self) -> None:
        self.norms: dict[int, float] = {}

    @override
    def on_values(self, trainer: TrainerCore, values: Mapping[str, float], step: int) -> None:
        if "grad_norm" in values:
            self.norms[step] = values["grad_norm"]


class DigitsTrainer(SeedMixin, GradClipMixin, ClassificationTrainer):
    pass


def main() -> None:
    torch.manual_seed(0)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float() / 16
    train, test = TensorDataset(images[360:], labels[360:]), TensorDataset(images[:360], labels[:360])
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    norms = GradNorms()
    trainer = DigitsTrainer(
        model,
        optimizer=AdamW(model.parameters(), lr=3e-3),
        num_classes=10,
        max_grad_norm=1.0,
        callbacks=[StopAt("accuracy", 0.93), norms],
        log_every=Steps(60),
        seed=0,
    )
    history = trainer.train(train, test, num_epochs=50, per_device_batch_size=32)
    trainer.print({step: round(norm, 2) for step, norm in norms.norms.items()})
    trainer.print(f"{history.stop_reason} after {len(history)} epochs")
    trainer.print(f"accuracy: {history[-1].metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
