"""Steps that are skipped, and runs that are stopped, at a spike of the loss or of the gradient norm."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import (
    CheckpointMixin,
    ClosureMixin,
    DeepSpeedMixin,
    FSDPMixin,
    GradClipMixin,
    MultiUpdateLoop,
    SeedMixin,
    Steps,
    Trainer,
    Update,
)
from ptacc.errors import OptionError
from ptacc.testing import tiny_data, tiny_parts
from tests.engines.test_scaler import ScalerOnTheHost
from tests.ranks import run_ranks

BATCH, STEPS, SPIKE = 4, 40, 33
GUARDS: list[dict[str, Any]] = [{"max_grad_deviations": 8.0}, {"max_loss_deviations": 8.0}]


class Guarded(GradClipMixin, Trainer): ...


class Saving(CheckpointMixin, SeedMixin, Guarded):
    seed: int | None = 0


class Sharded(FSDPMixin, Guarded): ...


def spiky_data() -> TensorDataset:
    """Return data whose step number `SPIKE`, counted from 1, has a large loss and large gradients."""
    inputs, targets = tiny_data(BATCH * STEPS).tensors
    spike = slice(BATCH * (SPIKE - 1), BATCH * SPIKE)
    inputs[spike] *= 1000
    targets[spike] = 1 - targets[spike]
    return TensorDataset(inputs, targets)


def make_parts() -> dict[str, Any]:
    parts = tiny_parts()
    return parts | {"optimizer": torch.optim.AdamW(parts["model"].parameters(), lr=0.01, weight_decay=0.1)}


def train(
    kind: Any = Guarded, action: str = "skip", *, batch: int = BATCH, steps: int = STEPS, **options: Any
) -> Trainer:
    trainer: Trainer = kind(**make_parts(), spike_action=action, **options)
    limits: Any = {"max_steps": steps, "per_device_batch_size": batch, "stop_check_every": 1}
    trainer.train(spiky_data(), **limits, train_dataloader_kwargs={"shuffle": False})
    return trainer


def weights(trainer: Trainer) -> list[float]:
    return torch.cat([weight.detach().flatten() for weight in trainer.unwrapped_model.parameters()]).tolist()


def train_plainly(steps: int = STEPS) -> list[float]:
    """Train without the update at the spike."""
    parts = make_parts()
    model, optimizer = parts["model"], parts["optimizer"]
    inputs, targets = spiky_data().tensors
    for start in range(0, BATCH * steps, BATCH):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs[start : start + BATCH]), targets[start : start + BATCH])
        loss.backward()  # type: ignore[no-untyped-call]
        if start != BATCH * (SPIKE - 1):
            optimizer.step()
    return torch.cat([weight.detach().flatten() for weight in model.parameters()]).tolist()


@pytest.mark.parametrize("guard", GUARDS)
def test_a_run_equals_a_plain_loop_without_the_update_at_the_spike(guard: dict[str, Any]) -> None:
    trainer = train(**guard)
    assert weights(trainer) == train_plainly()
    assert trainer.progress.steps == STEPS
    name = "grad_spikes" if "max_grad_deviations" in guard else "loss_spikes"
    assert [step.step for step in trainer.history.steps if step.logged[name]] == [SPIKE]


def test_clipping_applies_to_the_other_steps() -> None:
    guarded = train(max_grad_deviations=8.0, max_grad_norm=0.5, steps=SPIKE - 1)
    clipped = Guarded(**make_parts(), max_grad_norm=0.5)
    options: Any = {"max_steps": SPIKE - 1, "per_device_batch_size": BATCH}
    clipped.train(spiky_data(), **options, train_dataloader_kwargs={"shuffle": False})
    assert weights(guarded) == weights(clipped)


def test_a_stop_names_the_step_and_the_values_and_leaves_the_weights_from_before() -> None:
    trainer = train(action="stop", max_grad_deviations=8.0, max_loss_deviations=8.0)
    pattern = r"spike at step 33: loss \d+ \(mean [\d.]+, deviation [\d.]+, limit [\d.]+\), grad_norm .*limit"
    assert trainer.progress.steps == SPIKE
    assert re.match(pattern, trainer.history.stop_reason or "")
    assert weights(trainer) == train_plainly(SPIKE)


def test_a_stopped_run_continues_on_request(tmp_path: Path) -> None:
    options: Any = {"checkpoint_dir": tmp_path, "resume": True, "max_loss_deviations": 8.0}
    for _ in range(2):
        assert train(Saving, "stop", **options).progress.steps == SPIKE
    assert weights(train(Saving, "stop", **options, resume_ignore={"stop"})) == train_plainly()


class Scaled(ScalerOnTheHost, Guarded): ...


def test_a_scaled_spike_is_skipped_as_well() -> None:
    assert weights(train(Scaled, max_grad_deviations=8.0)) == train_plainly()


@pytest.mark.parametrize("guard", GUARDS)
def test_a_run_resumes_exactly_at_each_step(tmp_path: Path, guard: dict[str, Any]) -> None:
    train(Saving, **guard, checkpoint_dir=tmp_path / "whole", checkpoint_every=Steps(1), keep_last=None)
    for step in range(22, STEPS, 2):
        start = tmp_path / "whole" / f"step-{step:08}"
        assert weights(train(Saving, **guard, checkpoint_dir=tmp_path / f"{step}", resume=start)) == train_plainly()


@pytest.mark.parametrize("kind", [Guarded, Sharded])
@pytest.mark.parametrize("action", ["skip", "stop"])
def test_processes_act_at_the_same_step(kind: Any, action: str) -> None:
    def worker() -> tuple[int, str | None, list[float]]:
        trainer = train(kind, action, batch=BATCH // 2, max_grad_deviations=8.0, max_loss_deviations=8.0)
        return trainer.progress.steps, trainer.history.stop_reason, weights(trainer)

    first, second = run_ranks(worker, 2, timeout=60)
    assert first == second
    assert first[0] == (STEPS if action == "skip" else SPIKE + 1)
    assert (first[1] or "").startswith("" if action == "skip" else "spike at step 33")
    if action == "skip":
        assert first[2] == pytest.approx(train_plainly(), rel=1e-9)


class Several(GradClipMixin, MultiUpdateLoop[Any, Tensor]):
    @override
    def train_updates(self, batch: Any) -> Iterator[Update[Tensor]]:
        yield from ()


class ByClosure(ClosureMixin, Guarded): ...


class Deep(DeepSpeedMixin, Guarded): ...


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Guarded, {"spike_action": "warn"}, 'must be "clip", "skip" or "stop"'),
        (Guarded, {"spike_action": "skip"}, "no spike is defined. Set max_grad_deviations or max_loss_deviations"),
        (Guarded, {"max_loss_deviations": 4.0}, "a loss cannot be clipped"),
        (Guarded, {"max_loss_deviations": 0, "spike_action": "stop"}, "must be a finite number above 0"),
        (ByClosure, {"max_loss_deviations": 4.0, "spike_action": "stop"}, "an optimizer with a closure"),
        (Deep, {"max_loss_deviations": 4.0, "spike_action": "skip"}, "DeepSpeed cannot skip a step"),
    ],
)
def test_options_that_do_not_fit_are_errors(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        kind(**tiny_parts(), **options)


def test_several_updates_in_a_step_are_an_error() -> None:
    with pytest.raises(OptionError, match=r"max_loss_deviations=\.\.\.\): needs one update per step"):
        Several(nn.Linear(1, 1), optimizer=tiny_parts()["optimizer"], max_loss_deviations=3.0, spike_action="skip")
