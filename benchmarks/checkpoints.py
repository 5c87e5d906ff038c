"""What a checkpoint costs: against `torch.save`, and in the background against the foreground.

A trainer saves its run after each step: in the foreground, in the background, or not at all while `torch.save` writes
the same weights and optimizer's state to the same file system, flushed and synced. The three take turns, in an order
that turns as well, and each ratio is of neighbours: the machine's other load is in both. What is timed is all that the
loop waits for (`save_run_state`): the check of the weights for NaN, encoding, hashing, writing, syncing, manifest,
rename. The write behind a background save is awaited before the next turn, and not counted. Every save keeps its
files until its turn is over, so that no removal is timed; `--rotate` has the checkpoints rotated instead (each is read
back and verified before an older one is removed), and the older file of `torch.save` removed.

    OMP_NUM_THREADS=1 python benchmarks/checkpoints.py --directory /path/on/the/disk
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import field
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import CheckpointMixin, Progress, Steps, Trainer
from ptacc.mixins.checkpoint import SAVER

KINDS = ("foreground", "background", "torch.save")
WIDTH = 512
"""Of the model's layers, each of which has a mebibyte of weights."""


class Timed(CheckpointMixin, Trainer):
    """Takes turns among the ways to save, and times each."""

    rotates: bool = False
    turns: list[dict[str, float]] = field(init=False, default_factory=list)

    @override
    def save_run_state(self) -> None:
        line, number = self.run[SAVER].manager, len(self.turns)
        turn: dict[str, float] = {}
        for kind in (*KINDS[number % 3 :], *KINDS[: number % 3]):
            line.in_background, line.saved_at = kind == "background", Progress()  # or it would be saved already
            started = time.perf_counter()
            if kind == "torch.save":
                self._torch_save()
            else:
                super().save_run_state()
            turn[kind] = time.perf_counter() - started
            line.finish()
        self.turns.append(turn)
        if not self.rotates:
            for checkpoint in line.store.names():
                line.store.remove(checkpoint)

    def _torch_save(self) -> None:
        new = Path(self.checkpoint_dir) / f"{len(self.turns)}.pt"
        with new.open("xb") as file:
            torch.save({"model": self.unwrapped_model.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())
        for old in {*new.parent.glob("*.pt")} - {new}:
            old.unlink()


def measure(megabytes: int, turns: int, directory: Path, *, rotates: bool) -> list[dict[str, float]]:
    """Return the seconds that each way to save took, in each turn."""
    layers = max(1, round(megabytes / 3))  # Adam keeps two tensors for each of the weights
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    trainer = Timed(
        model,
        loss_func=nn.MSELoss(),
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-6),
        default_callbacks=(),
        checkpoint_dir=directory,
        checkpoint_every=Steps(1),
        keep_last=1 if rotates else None,
        rotates=rotates,
    )
    data = TensorDataset(torch.randn(turns, WIDTH), torch.randn(turns, WIDTH))
    trainer.train(data, max_steps=turns, per_device_batch_size=1)
    return trainer.turns[:turns]


def tell(name: str, ratios: Iterable[float]) -> None:
    """Print the median of some ratios, and how they spread."""
    values = sorted(ratios)
    low, middle, high = statistics.quantiles(values, n=4)
    print(f"  {name:40} {middle:.3f} (quartiles {low:.3f} to {high:.3f}, all {values[0]:.3f} to {values[-1]:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 500], help="sizes of the state")
    parser.add_argument("--turns", type=int, default=12, help="saves of each kind, the first of them not counted")
    parser.add_argument("--directory", type=Path, help="on the disk that is meant; the temporary one if not given")
    parser.add_argument("--rotate", action="store_true", help="verify each checkpoint, and remove the one before")
    asked = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)
    for megabytes in asked.megabytes:
        with tempfile.TemporaryDirectory(dir=asked.directory) as directory:
            first, *turns = measure(megabytes, asked.turns + 1, Path(directory), rotates=asked.rotate)
        medians = {kind: statistics.median(turn[kind] for turn in turns) for kind in KINDS}
        print(f"{megabytes} MB, {len(turns)} turns: " + ", ".join(f"{kind} {medians[kind]:.3f} s" for kind in KINDS))
        tell("foreground / torch.save", (turn["foreground"] / turn["torch.save"] for turn in turns))
        tell("stall in the background / foreground", (turn["background"] / turn["foreground"] for turn in turns))
        print(f"  {'the same, at the first save':40} {first['background'] / first['foreground']:.3f}")


if __name__ == "__main__":
    main()
