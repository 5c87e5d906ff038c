"""Optuna prunes bad trials, on one process and on several, and the next trial has a trainer of its own."""

import contextlib
import os
from pathlib import Path
from typing import Any

import optuna
import pytest
from accelerate.state import PartialState
from optuna.trial import BaseTrial, TrialState
from optuna_integration import TorchDistributedTrial

from ptacc import AMPMixin, CheckpointMixin, SeedMixin, Steps, Trainer
from ptacc.errors import OptionError
from ptacc.testing import iris_parts, iris_split
from ptacc.tuning import PruneTrial
from tests.ranks import run_ranks

RATES = [0.1, 0.2, 1e-6, 0.3]
"""The third one is too low, so that its trial is pruned."""
EPOCHS = 4


class MixedTrainer(AMPMixin, SeedMixin, Trainer):
    """A trainer whose precision trials can choose."""


class SavingTrainer(CheckpointMixin, Trainer):
    """A trainer that can be resumed."""


def train(trial: BaseTrial, rate: float, monitor: str = "eval_loss", **options: Any) -> float:
    parts = iris_parts()
    parts["optimizer"].param_groups[0]["lr"] = rate
    pruning = PruneTrial(trial, monitor)
    trainer = MixedTrainer(**parts, callbacks=[pruning], seed=0, **options)
    trainer.train(*iris_split(), num_epochs=EPOCHS, per_device_batch_size=24)
    return pruning.result()


def make_study() -> optuna.Study:
    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=2))
    for rate in RATES:
        study.enqueue_trial({"rate": rate})
    return study


def suggest_and_train(trial: BaseTrial, **options: Any) -> float:
    return train(trial, trial.suggest_float("rate", 1e-9, 1.0), **options)


def states(study: optuna.Study) -> list[TrialState]:
    return [trial.state for trial in study.trials]


EXPECTED = [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE]


def test_a_bad_trial_is_pruned_after_its_first_report() -> None:
    study = make_study()
    study.optimize(suggest_and_train, n_trials=len(RATES))
    assert states(study) == EXPECTED
    assert list(study.trials[2].intermediate_values) == [1]


def test_a_good_trial_has_a_report_of_each_evaluation_and_the_value_of_the_objective() -> None:
    study = make_study()
    study.optimize(suggest_and_train, n_trials=1)
    reports = study.trials[0].intermediate_values
    assert list(reports) == [1, 2, 3, 4]
    assert study.best_value == reports[EPOCHS]


def test_a_trial_after_a_pruned_one_can_have_another_precision_and_trains_as_a_first_one() -> None:
    study = make_study()
    study.optimize(
        lambda trial: suggest_and_train(trial, mixed_precision="bf16" if trial.number == 2 else "no"),
        n_trials=len(RATES),
    )
    first = make_study()
    first.optimize(lambda trial: train(trial, RATES[3]), n_trials=1)
    assert states(study) == EXPECTED
    assert study.trials[3].intermediate_values == first.trials[0].intermediate_values


def test_evaluations_within_an_epoch_are_reported() -> None:
    study = make_study()
    trainer = Trainer(**iris_parts(), callbacks=[PruneTrial(study.ask(), "eval_loss")])
    trainer.train(*iris_split(), max_steps=4, evaluate_every=Steps(1), per_device_batch_size=24)
    assert list(study.trials[0].intermediate_values) == [1, 2, 3, 4]


def test_a_resumed_trial_continues_the_numbers_of_its_reports(tmp_path: Path) -> None:
    study = make_study()
    for num_epochs in (2, 4):
        pruning = PruneTrial(study.ask(), "eval_loss")
        trainer = SavingTrainer(**iris_parts(), callbacks=[pruning], checkpoint_dir=tmp_path, resume=True)
        trainer.train(*iris_split(), num_epochs=num_epochs, per_device_batch_size=24)
    assert [list(trial.intermediate_values) for trial in study.trials[:2]] == [[1, 2], [3, 4]]


def test_an_unknown_value_is_an_error_before_the_first_step() -> None:
    with pytest.raises(OptionError, match=r"PruneTrial.*'evaluation_loss'"):
        train(make_study().ask(), 0.1, "evaluation_loss")


def tune_on_all_ranks() -> tuple[list[TrialState], list[float]]:
    PartialState(cpu=True)
    rank, values, study = int(os.environ["RANK"]), [], make_study()

    def objective(trial: optuna.Trial | None) -> float:
        values.append(suggest_and_train(TorchDistributedTrial(trial)))
        return values[-1]

    if rank == 0:
        study.optimize(objective, n_trials=len(RATES))
        return states(study), values
    for _ in RATES:
        with contextlib.suppress(optuna.TrialPruned):
            objective(None)
    return EXPECTED, values


@pytest.mark.filterwarnings("ignore:TorchDistributedTrial is experimental")
def test_two_processes_prune_the_same_trial_and_continue_with_the_next() -> None:
    first, second = run_ranks(tune_on_all_ranks, 2)
    assert first == second
    assert first[0] == EXPECTED
    assert len(first[1]) == 3
