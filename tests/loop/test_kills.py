"""Runs with several optimizers, closures or modes are killed after a step, and resume in a new process."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from ptacc import Callback, CheckpointMixin, Steps
from tests.loop import test_closure, test_several_optimizers, test_trained_together, test_updates
from tests.model import test_optimizer_modes
from tests.ranks import run_ranks

State = dict[str, Tensor]


class KillAfter(Callback[Any]):
    """Kills the last rank after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    @override
    def on_step_end(self, trainer: Any, step: Any) -> None:
        if step.step == self.step and trainer.distributed.rank == trainer.distributed.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def train_updates(name: str, **options: Any) -> State:
    return test_updates.train(type("Saving", (CheckpointMixin, test_updates.LOOPS[name][0]), {}), **options)


def train_several(name: str, **options: Any) -> State:
    return test_several_optimizers.train(name, mixins=(CheckpointMixin,), **options)[0]


def train_closure(name: str, **options: Any) -> State:
    options["batch"] = options.pop("batch_size")
    return test_closure.train(name, test_closure.Saving, **options)


def train_modes(batch_size: int, **options: Any) -> State:
    return test_optimizer_modes.train(test_optimizer_modes.make(test_optimizer_modes.Saving, **options), 6, batch_size)


def train_together(name: str, checkpoint_dir: Path, batch_size: int, **options: Any) -> State:
    trainer = test_trained_together.make(checkpoint_dir, **test_trained_together.OPTIONS[name], **options)
    return test_trained_together.train(trainer, batch_size=batch_size)


RUNS: dict[str, tuple[Callable[..., State], int, int]] = {
    **{name: (partial(train_updates, name), 6, 8) for name in test_updates.LOOPS},
    **{
        name: (partial(train_several, name), test_several_optimizers.GLOBAL_BATCH, test_several_optimizers.STEPS)
        for name in test_several_optimizers.LOOPS
    },
    **{name: (partial(train_closure, name), test_closure.STEP, 5) for name in test_closure.OPTIMIZERS},
    "schedule-free": (train_modes, 6, 6),
    **{name: (partial(train_together, name), 8, 9) for name in test_trained_together.OPTIONS},
}
"""Trains and returns weights and losses; the samples of a step, and the number of steps."""

prove = pytest.mark.prove
KILLS = [
    pytest.param(name, ranks, step, marks=() if ranks == 1 and step == steps // 2 else prove)
    for name, (_, _, steps) in RUNS.items()
    for ranks in (1, 2)
    for step in range(1, steps)
]


@pytest.mark.parametrize(("name", "ranks", "step"), KILLS)
@pytest.mark.timeout(120)
def test_a_run_that_was_killed_resumes_to_the_last_bit(name: str, ranks: int, step: int, tmp_path: Path) -> None:
    train, samples, _ = RUNS[name]
    run = partial(train, batch_size=samples // ranks, checkpoint_every=Steps(1))
    expected = run_ranks(lambda: run(checkpoint_dir=tmp_path / "whole"), ranks)
    killed = partial(run, checkpoint_dir=tmp_path / "run", callbacks=[KillAfter(step)])
    assert run_ranks(killed, ranks, may_die=range(ranks)) == []
    assert (tmp_path / "run" / f"step-{step - 1:08}").exists() == (step > 1)
    assert not (tmp_path / "run" / f"step-{step + 1:08}").exists()
    resumed = run_ranks(lambda: run(checkpoint_dir=tmp_path / "run", resume=True), ranks)
    for state, whole in zip(resumed, expected, strict=True):
        assert state.keys() == whole.keys()
        assert all(torch.equal(state[key], value) for key, value in whole.items())
