import math
from typing import Any

import pytest
from torch import Tensor
from typing_extensions import override

from ptacc import Callback, EarlyStoppingMixin, EpochRecord, Epochs, Steps, Trainer
from ptacc.errors import MonitorError, OptionError
from ptacc.testing import tiny_data, tiny_parts


class Scripted(EarlyStoppingMixin, Trainer):
    """Evaluates to given losses."""

    losses: tuple[float, ...] = ()

    @override
    def compute_eval_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum() * 0 + self.losses[min(len(self.history), len(self.losses) - 1)]


def count_epochs(losses: tuple[float, ...], patience: int, min_delta: float = 0.0) -> tuple[int, str | None]:
    trainer = Scripted(
        **tiny_parts(), losses=losses, early_stopping_patience=patience, early_stopping_min_delta=min_delta
    )
    history = trainer.train(tiny_data(), tiny_data(), num_epochs=len(losses))
    return len(history), history.stop_reason


@pytest.mark.parametrize(
    ("losses", "patience", "epochs"),
    [
        ((5.0, 4.0, 3.0, 2.0), 1, 4),
        ((5.0, 6.0, 4.0, 3.0), 1, 2),
        ((5.0, 6.0, 4.0, 4.5, 4.5, 3.0), 2, 5),
        ((5.0, 5.0, 5.0, 5.0), 3, 4),
        ((math.nan, math.nan, 1.0), 2, 2),
        ((math.nan, 1.0, math.nan, 0.5), 2, 4),
    ],
)
def test_it_stops_after_patience_checks_without_improvement(
    losses: tuple[float, ...], patience: int, epochs: int
) -> None:
    assert count_epochs(losses, patience)[0] == epochs


def test_an_improvement_must_be_at_least_min_delta() -> None:
    assert count_epochs((5.0, 4.95, 4.91), 2, min_delta=0.1)[0] == 3
    assert count_epochs((5.0, 4.8, 4.6, 4.4), 1, min_delta=0.1)[0] == 4


def test_the_reason_names_the_value() -> None:
    reason = count_epochs((5.0, 6.0, 7.0), 1)[1]
    assert reason == "eval_loss did not improve on 5 in 1 checks"


def test_a_training_value_is_checked_once_per_epoch() -> None:
    trainer = Scripted(**tiny_parts(), early_stopping_monitor="train_loss", early_stopping_min_delta=100.0)
    assert len(trainer.train(tiny_data(), num_epochs=9)) == 4


def test_every_scheduled_evaluation_is_a_check() -> None:
    trainer = Scripted(**tiny_parts(), losses=(1.0,), early_stopping_patience=3)
    history = trainer.train(tiny_data(24), tiny_data(8), num_epochs=9, evaluate_every=Steps(1))
    assert history[-1].step == 4


def test_a_misspelt_monitor_is_refused_before_the_run() -> None:
    with pytest.raises(MonitorError, match="Did you mean `eval_loss`"):
        Scripted(**tiny_parts(), early_stopping_monitor="evl_loss").train(tiny_data(), tiny_data(), num_epochs=1)


def test_an_evaluation_in_a_callback_is_not_a_check() -> None:
    class Testing(Callback[Scripted]):
        @override
        def on_epoch_end(self, trainer: Scripted, record: EpochRecord) -> None:
            trainer.evaluate(tiny_data())

    trainer = Scripted(**tiny_parts(), losses=(5.0, 6.0, 6.0, 4.0), early_stopping_patience=3, callbacks=[Testing()])
    assert len(trainer.train(tiny_data(), tiny_data(), num_epochs=4)) == 4


@pytest.mark.parametrize("delta", [-0.1, math.inf, math.nan])
def test_an_improvement_that_no_value_can_make_is_refused(delta: float) -> None:
    with pytest.raises(OptionError, match=r"early_stopping_min_delta=.*: must be finite and at least 0"):
        Scripted(**tiny_parts(), early_stopping_min_delta=delta)


@pytest.mark.parametrize(
    ("after", "epochs"), [(None, 2), (Epochs(1), 2), (Epochs(4), 4), (Steps(12), 4), (Steps(3), 2)]
)
def test_the_run_does_not_stop_before_a_given_time(after: Epochs | Steps | None, epochs: int) -> None:
    options: dict[str, Any] = {"early_stopping_patience": 1, "early_stopping_after": after}
    history = Scripted(**tiny_parts(), losses=(5.0, 6.0), **options).train(tiny_data(), tiny_data(), num_epochs=9)
    assert (len(history), history.stop_reason is not None) == (epochs, True)


def test_a_value_that_improves_again_before_the_time_does_not_stop_the_run() -> None:
    options: dict[str, Any] = {"early_stopping_patience": 1, "early_stopping_after": Epochs(3)}
    trainer = Scripted(**tiny_parts(), losses=(5.0, 6.0, 4.0, 3.0), **options)
    assert len(trainer.train(tiny_data(), tiny_data(), num_epochs=4)) == 4


def test_a_time_that_is_not_one_is_refused() -> None:
    with pytest.raises(OptionError, match=r"early_stopping_after=10\): must be Epochs\(10\), Steps\(1000\) or None"):
        Scripted(**tiny_parts(), early_stopping_after=10)  # type: ignore[arg-type]
