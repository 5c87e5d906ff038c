import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import CheckpointMixin, GradAccumMixin, GradClipMixin, MultiUpdateLoop, StepResult, Trainer, Update
from ptacc.errors import OptionError
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import run_ranks


class Clipped(GradAccumMixin, GradClipMixin, Trainer):
    """Records the gradients before the update."""

    @override
    def on_gradients_ready(self, step: StepResult) -> None:
        super().on_gradients_ready(step)
        step.logged["norm_after"] = torch.cat([g.flatten() for g in self.gradients()]).norm()
        step.logged["largest_after"] = torch.cat([g.flatten() for g in self.gradients()]).abs().max()

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.unwrapped_model.parameters() if p.grad is not None]


def test_the_norm_is_clipped_once_per_step_and_logged_before_clipping() -> None:
    trainer = Clipped(**tiny_parts(), max_grad_norm=0.1, gradient_accumulation_steps=2)
    steps = trainer.train(tiny_data(), num_epochs=2).steps
    assert all(step.logged["grad_norm"] > 0.1 for step in steps)
    assert [step.logged["norm_after"] for step in steps] == pytest.approx([0.1] * len(steps), rel=1e-4)


def test_values_are_clamped() -> None:
    steps = Clipped(**tiny_parts(), max_grad_value=0.01).train(tiny_data(), num_epochs=1).steps
    assert all(step.logged["largest_after"] == 0.01 for step in steps)


def test_an_infinite_max_norm_logs_without_clipping() -> None:
    steps = Clipped(**tiny_parts(), max_grad_norm=math.inf).train(tiny_data(), num_epochs=1).steps
    assert [step.logged["grad_norm"] for step in steps] == pytest.approx([step.logged["norm_after"] for step in steps])


def test_the_epochs_record_has_the_mean_norm() -> None:
    history = Clipped(**tiny_parts(), max_grad_norm=1.0).train(tiny_data(), num_epochs=1)
    norms = [step.logged["grad_norm"] for step in history.steps]
    assert history[0].logged["grad_norm"] == pytest.approx(sum(norms) / len(norms))


# ---- spikes

BATCH, STEPS, SPIKE = 4, 40, 33


def spiky_data() -> TensorDataset:
    """Return data whose step number `SPIKE`, counted from 1, has large gradients."""
    inputs, targets = tiny_data(BATCH * STEPS).tensors
    start = BATCH * (SPIKE - 1)
    inputs[start : start + BATCH] *= 1000
    targets[start : start + BATCH] = 1 - targets[start : start + BATCH]
    return TensorDataset(inputs, targets)


def train_on_spike(kind: type[Clipped] = Clipped, *, batch: int = BATCH, steps: int = STEPS, **options: Any) -> Clipped:
    trainer = kind(**tiny_parts(), max_grad_deviations=10.0, **options)
    kwargs: Any = {"shuffle": False}
    trainer.train(spiky_data(), max_steps=steps, per_device_batch_size=batch, train_dataloader_kwargs=kwargs)
    return trainer


def weight(trainer: Trainer) -> Tensor:
    return next(trainer.unwrapped_model.parameters()).detach()


def compute_limit(norms: list[float]) -> float:
    mean = variance = 0.0
    for number, norm in enumerate(norms, start=1):
        weight, change = max(1 / number, 0.03), norm - mean
        mean, variance = mean + weight * change, (1 - weight) * (variance + weight * change**2)
    return mean + 10 * math.sqrt(variance)


def test_the_gradient_of_a_spike_is_scaled_to_the_deviations_above_the_mean() -> None:
    steps = train_on_spike().history.steps
    spike = steps[SPIKE - 1]
    assert [step.step for step in steps if step.logged["grad_spikes"]] == [SPIKE]
    limit = compute_limit([step.logged["grad_norm"] for step in steps[: SPIKE - 1]])
    assert spike.logged["norm_after"] == pytest.approx(limit, rel=1e-4)
    assert spike.logged["grad_norm"] > 100 * limit


def test_other_steps_are_not_changed() -> None:
    before = train_on_spike(steps=SPIKE - 1)
    plain = Trainer(**tiny_parts())
    kwargs: Any = {"shuffle": False}
    plain.train(spiky_data(), max_steps=SPIKE - 1, per_device_batch_size=BATCH, train_dataloader_kwargs=kwargs)
    assert torch.equal(weight(before), weight(plain))


def test_the_lower_of_the_two_limits_applies() -> None:
    steps = train_on_spike(max_grad_norm=0.05).history.steps
    assert max(step.logged["norm_after"] for step in steps) == pytest.approx(0.05, rel=1e-4)


class Saving(CheckpointMixin, Clipped): ...


@pytest.mark.parametrize("steps", [20, SPIKE - 1, SPIKE])
def test_a_resumed_run_clips_the_same(tmp_path: Path, steps: int) -> None:
    train_on_spike(Saving, steps=steps, checkpoint_dir=tmp_path)
    resumed = train_on_spike(Saving, checkpoint_dir=tmp_path, resume=True)
    assert torch.equal(weight(resumed), weight(train_on_spike()))


def test_ranks_clip_the_same_and_as_one_process_does() -> None:
    def train() -> list[float]:
        return weight(train_on_spike(batch=BATCH // 2)).flatten().tolist()

    first, second = run_ranks(train, 2, timeout=60)
    assert first == second
    assert first == pytest.approx(weight(train_on_spike()).flatten().tolist())


def test_several_updates_in_a_step_are_an_error() -> None:
    class Several(GradClipMixin, MultiUpdateLoop[Any, Tensor]):
        @override
        def train_updates(self, batch: Any) -> Iterator[Update[Tensor]]:
            yield from ()

    with pytest.raises(OptionError, match="needs one update per step"):
        Several(torch.nn.Linear(1, 1), optimizer=tiny_parts()["optimizer"], max_grad_deviations=3.0)
