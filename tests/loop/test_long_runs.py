"""A run of 100,000 steps: the cost of a step stays the same, and memory does not grow."""

import gc
import io
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import (
    AMPMixin,
    Callback,
    EarlyStoppingMixin,
    EMAMixin,
    EpochRecord,
    GradAccumMixin,
    GradClipMixin,
    LRSchedulerMixin,
    PrintMetrics,
    ProfilerMixin,
    RunPlan,
    SeedMixin,
    StopOnNonFinite,
    Throughput,
    Trainer,
    TrainerCore,
)
from ptacc.run.step_result import StepResult

pytestmark = [pytest.mark.prove, pytest.mark.timeout(1800)]

EPOCHS, STEPS_OF_AN_EPOCH, BATCH = 10, 10_000, 2
FROM, TO = 4, 9
"""Epochs after which memory holds the last 1,000 steps, and about as many reports of values: 799 and 824."""
WINDOW = 100
EARLY, LATE = 1_200, 99_200
"""First steps of the windows. The history, which is read every 1,000 steps, is not read in them."""
BLOCKS_OF_AN_EPOCH = 100
"""Blocks of Python's allocator that an epoch may keep: for its record, and none for its steps."""
BYTES = 5 * 2**20
"""Growth of resident memory allowed in all: about a hundred bytes for each of the 50,000 measured steps."""


class Growth(Callback[TrainerCore]):
    """Measures the memory at the end of each epoch."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.resident: list[int] = []

    @override
    def on_epoch_end(self, trainer: TrainerCore, record: EpochRecord) -> None:
        gc.collect()
        self.blocks.append(sys.getallocatedblocks())
        self.resident.append(psutil.Process().memory_info().rss)


class Calls(Callback[TrainerCore]):
    """Counts the calls of Python and C functions in two windows."""

    def __init__(self) -> None:
        self.windows: dict[int, Counter[str]] = {EARLY: Counter(), LATE: Counter()}

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        if step.step in self.windows:
            counts = self.windows[step.step]

            def count(frame: FrameType, event: str, called: object) -> None:
                if event == "call":
                    counts[frame.f_code.co_qualname] += 1
                elif event == "c_call":
                    counts[getattr(called, "__qualname__", "")] += 1

            gc.disable()  # when it finalizes objects does not depend on steps
            sys.setprofile(count)
        elif step.step - WINDOW in self.windows:
            sys.setprofile(None)
            gc.enable()


class Composed(
    AMPMixin,
    GradAccumMixin,
    GradClipMixin,
    LRSchedulerMixin,
    EarlyStoppingMixin,
    SeedMixin,
    EMAMixin,
    ProfilerMixin,
    Trainer,
): ...


def decaying(optimizer: Optimizer, plan: RunPlan) -> StepLR:
    return StepLR(optimizer, 1_000, gamma=0.99)


def make_options(kind: str, folder: Path) -> tuple[type[Trainer], dict[str, Any]]:
    if kind == "bare":
        return Trainer, {}
    if kind == "with a history file":
        return Trainer, {"history_file": folder / "history.jsonl"}
    return Composed, {
        "history_file": folder / "history.jsonl",
        "mixed_precision": "no",
        "max_grad_norm": 1.0,
        "create_scheduler": decaying,
        "early_stopping_monitor": "train_loss",
        "early_stopping_patience": 100,
        "seed": 0,
        "ema_decay": 0.99,
        "default_callbacks": [StopOnNonFinite(), PrintMetrics(file=io.StringIO())],
    }


def train(kind: str, folder: Path, *callbacks: Callback[Any]) -> Trainer:
    make, options = make_options(kind, folder)
    net = nn.Linear(2, 1)
    given: dict[str, Any] = {"default_callbacks": (), **options}
    reporting = [Throughput(every=20)] if kind == "composed" else []
    trainer = make(
        net,
        loss_func=nn.MSELoss(),
        optimizer=SGD(net.parameters(), lr=0.01),
        callbacks=[*callbacks, *reporting],
        **given,
    )
    inputs = torch.randn(STEPS_OF_AN_EPOCH * BATCH, 2)
    data = TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))
    trainer.train(data, num_epochs=EPOCHS, per_device_batch_size=BATCH)
    return trainer


@pytest.mark.parametrize("kind", ["bare", "with a history file", "composed"])
def test_step_100000_costs_what_step_1000_does_and_memory_does_not_grow(kind: str, tmp_path: Path) -> None:
    growth, calls = Growth(), Calls()
    trainer = train(kind, tmp_path, growth, calls)
    assert trainer.progress.steps == EPOCHS * STEPS_OF_AN_EPOCH
    assert calls.windows[EARLY].total() > 20 * WINDOW
    assert calls.windows[LATE] == calls.windows[EARLY]
    assert growth.blocks[TO - 1] - growth.blocks[FROM - 1] < BLOCKS_OF_AN_EPOCH * (TO - FROM)
    assert growth.resident[TO - 1] - growth.resident[FROM - 1] < BYTES
