"""A run that trackers follow, and that is killed and resumed."""

import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import IterableDataset
from typing_extensions import override

from ptacc import CheckpointMixin, SeedMixin, StepResult, Steps, TrackingMixin, Trainer
from ptacc.errors import RankFailedError
from ptacc.protocols import Tracker
from tests.ranks import run_ranks

STEPS, KILLS, IMAGE_AT = 50, (17, 38), 20
"""Steps of the run, those after which it is killed, and that of an image. There is a checkpoint after each 15 steps."""
Make: TypeAlias = Callable[[], Sequence[Tracker | str]]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """The same samples each time, without an end."""

    @override
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        while True:
            inputs = torch.randn(4, generator=generator)
            yield inputs, inputs.argmax()


class Tracked(TrackingMixin, CheckpointMixin, SeedMixin, Trainer):
    """Logs an image, and kills rank 0 after a step, if asked to.

    Options:
        kill_at: The step.
    """

    kill_at: int | None = None

    @override
    def on_step_end(self, step: StepResult) -> None:
        super().on_step_end(step)
        if step.step == IMAGE_AT:
            self.log_image("samples", torch.full((4, 4), 0.5))

    @override
    def on_step_start(self) -> None:
        super().on_step_start()
        if self.progress.steps == self.kill_at and self.distributed.is_main:
            os.kill(os.getpid(), signal.SIGKILL)


def make_trainer(directory: Path, trackers: Sequence[Tracker | str], **options: Any) -> Tracked:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    return Tracked(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=SGD(model.parameters(), lr=0.1),
        default_callbacks=(),
        checkpoint_dir=directory / "checkpoints",
        checkpoint_every=Steps(15),
        log_every=Steps(4),
        seed=0,
        trackers=trackers,
        **options,
    )


def train(trainer: Tracked, max_steps: int = STEPS) -> None:
    """Train for 50 steps, with an evaluation every 10 steps, a report every 4 and a checkpoint every 15."""
    size = 8 // trainer.distributed.world_size
    options: dict[str, Any] = {"evaluate_every": Steps(10), "per_device_batch_size": size}
    trainer.train(Stream(), list(islice(Stream(), 16)), max_steps=max_steps, **options)


def train_killed_twice(directory: Path, make: Make, world_size: int = 1) -> None:
    """Train in processes of which rank 0 is killed, twice, and then to the end."""

    def attempt(kill_at: int | None) -> None:
        warnings.simplefilter("ignore")  # those of the packages
        warnings.filterwarnings("error", message="The tracker .* failed")
        trainer = make_trainer(directory, make(), kill_at=kill_at, resume=True)
        if kill_at is None:
            train(trainer)
        else:
            with pytest.raises(RankFailedError):
                train(trainer)

    for kill_at in KILLS:
        run_ranks(attempt, world_size, kill_at, may_die={0})
    run_ranks(attempt, world_size, None)
