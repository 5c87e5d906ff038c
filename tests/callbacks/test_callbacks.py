import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from ptacc import (
    Callback,
    MetricsMixin,
    Monitor,
    RestoreBestWeights,
    StopOnNonFinite,
    Trainer,
    TrainerCore,
)
from ptacc.testing import tiny_data, tiny_parts


class Breaking(Trainer):
    """Has a non-finite loss from step `breaks_at` on."""

    breaks_at: int = 3
    with_value: float = math.nan

    @override
    def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = super().compute_train_loss(outputs, targets)
        return loss * self.with_value if self.progress.steps + 1 >= self.breaks_at else loss


def make_parts(*callbacks: Callback[Any]) -> dict[str, Any]:
    return {**tiny_parts(), "callbacks": callbacks}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_loss_stops_the_run(value: float) -> None:
    history = Breaking(**make_parts(StopOnNonFinite()), with_value=value).train(tiny_data(), num_epochs=9)
    assert (history.stop_reason, history[-1].step) == ("non-finite loss at step 3", 3)


def test_a_non_finite_evaluation_loss_stops_the_run() -> None:
    class BreakingInEvaluation(Breaking):
        @override
        def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return Trainer.compute_train_loss(self, outputs, targets)

        @override
        def compute_eval_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return super().compute_eval_loss(outputs, targets) * self.with_value

    trainer = BreakingInEvaluation(**make_parts(StopOnNonFinite()))
    history = trainer.train(tiny_data(), {"held-out": tiny_data(8)}, num_epochs=9)
    assert history.stop_reason == "non-finite loss in the evaluation 'held-out' after step 3"
    assert math.isnan(trainer.evaluate(tiny_data()).loss)


def test_stopping_at_non_finite_losses_is_the_default() -> None:
    options = {name: value for name, value in tiny_parts().items() if name != "default_callbacks"}
    assert Breaking(**options).train(tiny_data(), num_epochs=2).stop_reason is not None
    assert Breaking(**options, default_callbacks=()).train(tiny_data(), num_epochs=2).stop_reason is None


def test_reported_losses_are_not_altered() -> None:
    history = Breaking(**make_parts()).train(tiny_data(), num_epochs=1)
    assert [math.isnan(step.loss) for step in history.steps] == [False, False, True]
    assert math.isnan(history[0].train_loss)


def test_the_default_callbacks_come_first() -> None:
    options = {name: value for name, value in tiny_parts().items() if name != "default_callbacks"}
    trainer = Trainer(**options, callbacks=[RestoreBestWeights("train_loss")])
    names = [type(callback).__name__ for callback in trainer.all_callbacks()]
    assert names == ["StopOnNonFinite", "ProgressBar", "PrintMetrics", "RestoreBestWeights"]


class Worsening(Trainer):
    """Improves for one epoch, and worsens after that."""

    @override
    def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = super().compute_train_loss(outputs, targets)
        return loss if self.progress.epochs == 0 else -20 * loss


@pytest.mark.parametrize("restore", [True, False])
def test_the_best_weights_are_saved_and_restored(restore: bool) -> None:
    best = RestoreBestWeights("eval_loss", restore=restore)
    trainer = Worsening(**make_parts(best))
    history = trainer.train(tiny_data(), tiny_data(), num_epochs=3)
    assert (best.best_epoch, best.best_value) == (1, history[0].eval_loss)
    is_best = torch.equal(trainer.model.state_dict()["weight"], best.best_weights["weight"])
    assert is_best is restore


def test_nan_is_never_best() -> None:
    assert not Monitor("loss").is_better(math.nan, than=math.nan)
    assert not Monitor("loss").is_better(math.nan, than=1.0)
    assert Monitor("loss").is_better(1.0, than=math.nan)


def test_a_monitor_has_its_own_mode() -> None:
    class Constant(nn.Module):
        value = 0.0

        def update(self, outputs: Tensor, targets: Tensor) -> None: ...

        def compute(self) -> float:
            self.value += 1
            return self.value

        def reset(self) -> None: ...

    class Measured(MetricsMixin, Trainer): ...

    rising = Monitor("rising", mode="max")
    best = RestoreBestWeights(rising)
    trainer = Measured(**make_parts(best), metrics={rising.name: Constant()})
    trainer.train(tiny_data(), tiny_data(), num_epochs=3)
    assert (best.best_epoch, best.best_value) == (3, 3.0)


def test_a_callback_for_trainer_core_works_with_every_trainer() -> None:
    class Asking(Callback[TrainerCore]):
        @override
        def on_run_start(self, trainer: TrainerCore) -> None:
            assert trainer.run.plan.total_steps == 6

    Trainer(**make_parts(Asking())).train(tiny_data(24), num_epochs=2)
