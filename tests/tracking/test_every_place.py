"""A run that is interrupted twice shows each evaluation once: in history, file, console, tracker and report."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import IterableDataset
from typing_extensions import override

from ptacc import (
    Callback,
    CheckpointMixin,
    Pair,
    PrintMetrics,
    RunHistory,
    SeedMixin,
    StepResult,
    Steps,
    TrackingMixin,
    Trainer,
    TrainerCore,
)
from ptacc.cli import main
from ptacc.testing import tiny_data, tiny_parts
from ptacc.tracking import JSONLinesTracker

EVALUATED = [10, 20, 30, 40, 50]


class Tracked(TrackingMixin, SeedMixin, CheckpointMixin, Trainer): ...


class Endless(IterableDataset[Pair]):
    @override
    def __iter__(self) -> Iterator[Pair]:
        while True:
            for index in range(16):
                inputs, target = tiny_data(16)[index]
                yield inputs, target


class Killed(BaseException):
    pass


class Kill(Callback[TrainerCore]):
    def __init__(self, step: int) -> None:
        self.step = step

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        if step.step == self.step:
            raise Killed


def train(folder: Path, console: io.StringIO, kill_at: int) -> RunHistory:
    options: dict[str, Any] = {
        "callbacks": [Kill(kill_at), PrintMetrics(every="evaluation", file=console)],
        "default_callbacks": (),
        "checkpoint_dir": folder,
        "checkpoint_every": Steps(7),
        "checkpoint_on_exception": False,
        "resume": True,
        "history_file": folder / "history.jsonl",
        "trackers": [JSONLinesTracker(folder / "tracked.jsonl")],
        "seed": 0,
    }
    trainer = Tracked(**{**tiny_parts(), **options})
    return trainer.train(Endless(), tiny_data(8), max_steps=50, evaluate_every=Steps(10), per_device_batch_size=4)


def find_steps(file: Path, name: str, **fields: str) -> list[int]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line["step"] for line in lines if name in line and all(line.get(key) == fields[key] for key in fields)]


def test_each_evaluation_is_in_every_place_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for kill_at in (27, 44):
        with pytest.raises(Killed):
            train(folder, io.StringIO(), kill_at)
    console = io.StringIO()
    history = train(folder, console, kill_at=0)
    assert [record.step for record in history.evaluations] == EVALUATED
    assert find_steps(folder / "history.jsonl", "loss", kind="evaluation") == EVALUATED
    assert find_steps(folder / "tracked.jsonl", "eval_loss") == EVALUATED
    printed = [line.split() for line in console.getvalue().splitlines()]
    assert [int(row[1]) for row in printed if row[1].isdigit()] == [50]  # it resumed after step 42
    assert main(["report", str(folder), "-o", str(tmp_path / "page.html")]) == 0
    assert "2 times, from steps 21, 42" in (tmp_path / "page.html").read_text()
