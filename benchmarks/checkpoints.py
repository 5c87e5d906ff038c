"""Measure the time to save a checkpoint, compared with `torch.save`.

After each step, a trainer saves its run in the foreground, saves it in the background, and writes the same weights and
optimizer state with `torch.save`, flushed and synced. The order of the three rotates. Each ratio compares saves of the
same step, so other load on the machine affects both. It is the median of all steps with a 95 % bootstrap interval.

The measured time is the time that the loop waits in `save_run_state`: the check for NaN, encoding, hashing, writing,
syncing, the manifest, the rename, and the removal of the previous checkpoint. `torch.save` removes its previous file,
too. The next save waits for a background write to finish, and this wait is not measured. With `--no-rotate`, files are
removed outside the measurement.

    OMP_NUM_THREADS=1 python -m benchmarks.checkpoints --directory /path/on/the/disk
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset
from typing_extensions import override

from benchmarks.speed.ratios import estimate
from benchmarks.speed.report import format_ratio, format_table
from ptacc import CheckpointMixin, Progress, Steps, Trainer
from ptacc.mixins.checkpoint import SAVER

KINDS = ("foreground", "background", "torch.save")
HEAD = (
    "weights and optimizer state",
    "save, s",
    "wait for a background save, s",
    "`torch.save`, s",
    "save / `torch.save`",
    "wait / `torch.save`",
)
WIDTH = 512
"""The width of the layers. Each layer has a mebibyte of weights."""


class Timed(CheckpointMixin, Trainer):
    """A trainer that saves in each way after each step, and measures the times."""

    rotates: bool = False
    turns: list[dict[str, float]] = field(init=False, default_factory=list, metadata={"saved": False})

    @override
    def save_run_state(self) -> None:
        saver, number = self.run[SAVER], len(self.turns)
        manager = saver.manager
        turn: dict[str, float] = {}
        for kind in (*KINDS[number % 3 :], *KINDS[: number % 3]):
            manager.in_background = kind == "background"
            saver.saved_at = Progress()  # otherwise the second save would be skipped
            started = time.perf_counter()
            if kind == "torch.save":
                self._torch_save()
            else:
                super().save_run_state()
            turn[kind] = time.perf_counter() - started
            manager.finish()
        self.turns.append(turn)
        if not self.rotates:
            for checkpoint in manager.store.names():
                manager.store.remove(checkpoint)

    def _torch_save(self) -> None:
        new = Path(self.checkpoint_dir) / f"{len(self.turns)}.pt"
        with new.open("xb") as file:
            torch.save({"model": self.unwrapped_model.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())
        for old in {*new.parent.glob("*.pt")} - {new}:
            old.unlink()


def measure(megabytes: int, turns: int, directory: Path, *, rotates: bool) -> list[dict[str, float]]:
    """Return the seconds of each kind of save, for each turn."""
    layers = max(1, round(megabytes / 3))  # Adam stores two tensors per weight
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


def format_row(megabytes: int, turns: Sequence[dict[str, float]]) -> Sequence[str]:
    """Return the median seconds of each kind of save, and the ratios with their intervals."""
    medians = {kind: statistics.median(turn[kind] for turn in turns) for kind in KINDS}
    saves = estimate([turn["foreground"] / turn["torch.save"] for turn in turns])
    waits = estimate([turn["background"] / turn["torch.save"] for turn in turns])
    return [f"{megabytes} MB", *(f"{medians[kind]:.3f}" for kind in KINDS), format_ratio(saves), format_ratio(waits)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 500], help="sizes of the state in MB")
    parser.add_argument("--turns", type=int, default=20, help="saves of each kind, in addition to a first one")
    parser.add_argument(
        "--directory", type=Path, help="directory on the disk to measure; default: the temporary directory"
    )
    parser.add_argument(
        "--rotate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="remove the previous checkpoint within the measured time",
    )
    parser.add_argument("--out", type=Path, help="file for the table")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = []
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory(dir=args.directory) as directory:
            _, *turns = measure(megabytes, args.turns + 1, Path(directory), rotates=args.rotate)
        rows.append(format_row(megabytes, turns))
    text = format_table(HEAD, rows) + "\n"
    print(text)
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
