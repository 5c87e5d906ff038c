"""A rank is killed under each engine, and the run resumes in new processes to the same result."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from ptacc import CheckpointMixin, DeepSpeedMixin, FSDPMixin, StepResult, Steps, TensorParallelMixin
from ptacc.errors import RankFailedError
from tests.engines.nets import SPLIT, Usual, digits, make_optimizer, make_pairs
from tests.marks import DEEPSPEED
from tests.ranks import run_ranks

pytestmark = DEEPSPEED
prove = pytest.mark.prove
LAST, KILLED = 9, 5
"""Steps of a complete run, and the step after which a rank is killed: there is a checkpoint of step 4."""


class Saving(CheckpointMixin, Usual):
    """Kills rank 1 after a step, if asked to.

    Options:
        kill_at: The step.
    """

    kill_at: int | None = None

    @override
    def on_step_end(self, step: StepResult) -> None:
        super().on_step_end(step)
        if step.step == self.kill_at and self._distributed.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


class Sharded(FSDPMixin, Saving): ...


class Split(TensorParallelMixin, Saving): ...


class Deep(DeepSpeedMixin, Saving): ...


ENGINES: Mapping[str, tuple[type[Saving], dict[str, Any]]] = {
    "ddp": (Saving, {}),
    "fsdp": (Sharded, {}),
    "tensor parallel": (Split, {"tensor_parallel_plan": SPLIT}),
    **{f"zero {stage}": (Deep, {"zero_stage": stage}) for stage in (0, 1, 2, 3)},
}
NORMALLY = ("fsdp", "tensor parallel", "zero 3")
"""The engines that are killed in every run of the suite."""


def train(engine: str, directory: Path, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    kind, its_options = ENGINES[engine]
    model = make_pairs()
    trainer = kind(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=make_optimizer(model),
        default_callbacks=(),
        checkpoint_dir=directory,
        checkpoint_every=Steps(2),
        **its_options,
        **options,
    )
    size = 12 // trainer.gradient_accumulation_steps // trainer.distributed.replicas
    history = trainer.train(digits(200), num_epochs=2, max_steps=LAST, per_device_batch_size=size)
    return [step.loss for step in history.steps], {name: t.clone() for name, t in model.state_dict().items()}


def is_killed(engine: str, directory: Path) -> bool:
    with pytest.raises(RankFailedError):
        train(engine, directory, kill_at=KILLED)
    return True


@pytest.mark.parametrize("engine", [name if name in NORMALLY else pytest.param(name, marks=prove) for name in ENGINES])
def test_a_run_whose_rank_was_killed_resumes_to_the_last_bit(engine: str, tmp_path: Path) -> None:
    whole = run_ranks(train, 2, engine, tmp_path / "whole")
    assert run_ranks(is_killed, 2, engine, tmp_path / "run", may_die={1}) == [True]
    again = run_ranks(lambda: train(engine, tmp_path / "run", resume=True), 2)
    for (losses, weights), (expected, theirs) in zip(again, whole, strict=True):
        assert len(losses) == LAST
        assert losses == expected
        assert all(torch.equal(weights[name], theirs[name]) for name in theirs)
