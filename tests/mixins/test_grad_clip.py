import math

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from ptacc import GradAccumMixin, GradClipMixin, StepResult, Trainer
from ptacc.testing import tiny_data, tiny_parts


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
