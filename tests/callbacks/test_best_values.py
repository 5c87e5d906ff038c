"""Whatever monitors a value acts at each evaluation of it, with the weights of that moment."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import IterableDataset
from typing_extensions import override

from ptacc import (
    Best,
    Callback,
    CheckpointMixin,
    EarlyStoppingMixin,
    EpochRecord,
    EvalResult,
    LRSchedulerMixin,
    RestoreBestWeights,
    RunPlan,
    SaveBest,
    SeedMixin,
    Steps,
    Trainer,
    TrainerCore,
)
from ptacc.protocols import SchedulerFactory
from ptacc.storage.store import CheckpointStore
from ptacc.testing import tiny_data, tiny_parts
from ptacc.types.aliases import Mode

SETS = {"": tiny_data(), "other": tiny_data(8)}


class Endless(IterableDataset[Any]):
    @override
    def __iter__(self) -> Iterator[Any]:
        return itertools.cycle([tiny_data()[i] for i in range(24)])


class Recorded(Callback[TrainerCore]):
    """Records each evaluation of the first set, with the weights."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, int, Tensor]] = []

    @override
    def on_evaluation_end(self, trainer: TrainerCore, name: str, result: EvalResult) -> None:
        if not name and trainer.run.is_scheduled_evaluation:
            weight = trainer.unwrapped_model.get_parameter("weight").detach().clone()
            self.seen.append((result.loss, trainer.progress.steps, weight))

    @property
    def best(self) -> tuple[float, int, Tensor]:
        return max(self.seen, key=lambda seen: seen[0])


def train(trainer: Trainer, stream: bool, **options: Any) -> None:
    """Train for ten steps. The loss falls, so that the first evaluation has the largest one."""
    data: Any = Endless() if stream else tiny_data()
    given: dict[str, Any] = {"max_steps": 10, "per_device_batch_size": 8, "evaluate_every": Steps(2), **options}
    trainer.train(data, tiny_data(), **given)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("options", [{}, {"evaluate_every": Steps(4)}, {"evaluate_first": True}])
def test_the_best_weights_are_those_that_were_evaluated(stream: bool, options: dict[str, Any]) -> None:
    recorded, best = Recorded(), RestoreBestWeights("eval_loss", mode="max")
    trainer = Trainer(**tiny_parts(), callbacks=[recorded, best])
    train(trainer, stream, **options)
    value, step, weight = recorded.best
    assert (best.best_value, best.best_step) == (value, step)
    assert torch.equal(best.best_weights["weight"], weight)
    assert trainer.evaluate(tiny_data()).loss == value


def test_the_best_weights_of_one_of_several_sets_are_those_it_was_evaluated_with() -> None:
    best = RestoreBestWeights("other/loss", mode="max")
    trainer = Trainer(**tiny_parts(), callbacks=[best])
    trainer.train(tiny_data(), SETS, num_epochs=3, evaluate_every=Steps(2))
    assert (best.best_step, best.best_epoch) == (2, 1)
    assert trainer.evaluate(SETS["other"]).loss == best.best_value


@pytest.mark.parametrize(("every", "expected"), [(None, (1, 3)), (Steps(4), (2, 4)), (Steps(3), (1, 3))])
def test_the_best_epoch_is_the_one_that_reported_the_value(every: Steps | None, expected: tuple[int, int]) -> None:
    best = RestoreBestWeights("eval_loss", mode="max")
    options: Any = {} if every is None else {"evaluate_every": every}
    Trainer(**tiny_parts(), callbacks=[best]).train(tiny_data(), tiny_data(), num_epochs=3, **options)
    assert (best.best_epoch, best.best_step) == expected


@pytest.mark.parametrize(("mode", "step"), [("max", 2), ("min", 10)])
def test_a_run_that_is_resumed_between_evaluations_keeps_the_best_of_both_parts(
    tmp_path: Path, mode: Mode, step: int
) -> None:
    class Saved(CheckpointMixin, SeedMixin, Trainer):
        seed: int | None = 1

    def run(directory: str, steps: int, **options: Any) -> tuple[float, int, list[float]]:
        best = RestoreBestWeights("eval_loss", mode=mode)
        trainer = Saved(**tiny_parts(), checkpoint_dir=tmp_path / directory, callbacks=[best], **options)
        train(trainer, stream=False, max_steps=steps)
        return best.best_value, best.best_step, trainer.model.get_parameter("bias").tolist()

    run("parts", 5)
    assert run("parts", 10, resume=True) == (whole := run("whole", 10))
    assert whole[1] == step


@pytest.mark.parametrize("stream", [True, False])
def test_reduce_lr_on_plateau_steps_at_each_evaluation(stream: bool) -> None:
    class Scheduled(LRSchedulerMixin, Trainer):
        create_scheduler: SchedulerFactory = lambda optimizer, plan: ReduceLROnPlateau(
            optimizer, mode="max", factor=0.5, patience=0
        )

    recorded = Recorded()
    trainer = Scheduled(**tiny_parts(), callbacks=[recorded])
    train(trainer, stream)
    expected = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    plateau = ReduceLROnPlateau(expected, mode="max", factor=0.5, patience=0)
    for value, _, _ in recorded.seen:
        plateau.step(value)
    assert plateau.state_dict() == trainer.scheduler.state_dict()
    rates = [step.learning_rate for step in trainer.history.steps]
    assert rates == [0.1] * 4 + [0.05] * 2 + [0.025] * 2 + [0.0125] * 2


def test_reduce_lr_on_plateau_steps_at_the_end_of_an_epoch_for_a_training_value() -> None:
    def plateau(optimizer: Optimizer, plan: RunPlan) -> ReduceLROnPlateau:
        return ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=0)

    class Scheduled(LRSchedulerMixin, Trainer): ...

    trainer = Scheduled(**tiny_parts(), create_scheduler=plateau, scheduler_monitor="train_loss")
    trainer.train(tiny_data(), tiny_data(), num_epochs=3, evaluate_every=Steps(1))
    assert [record.learning_rate for record in trainer.history] == [0.1, 0.1, 0.05]


@pytest.mark.parametrize("stream", [True, False])
def test_each_best_checkpoint_holds_the_weights_that_were_evaluated(tmp_path: Path, stream: bool) -> None:
    class Saved(CheckpointMixin, Trainer): ...

    recorded = Recorded()
    options: Any = {"checkpoint_dir": tmp_path, "checkpoint_every": None}
    trainer = Saved(**tiny_parts(), **options, callbacks=[recorded, SaveBest("eval_loss")])
    train(trainer, stream)
    manifests = [manifest for manifest in CheckpointStore(str(tmp_path)).manifests() if manifest.label]
    assert [manifest.step for manifest in manifests] == [2, 4, 6, 8, 10]
    for manifest, (value, step, _) in zip(manifests, recorded.seen, strict=True):
        trainer.load_checkpoint(tmp_path / manifest.name)
        assert (manifest.step, manifest.metrics["eval_loss"]) == (step, value)
        assert trainer.evaluate(tiny_data()).loss == value


@pytest.mark.parametrize("stream", [True, False])
def test_keep_best_keeps_the_best_evaluations_at_any_interval(tmp_path: Path, stream: bool) -> None:
    class Saved(CheckpointMixin, Trainer): ...

    recorded = Recorded()
    rules: Any = {"checkpoint_every": Steps(3), "keep_last": 1, "keep_best": Best("eval_loss", mode="max", count=2)}
    for steps in (5, 10):
        trainer = Saved(**tiny_parts(), checkpoint_dir=tmp_path, callbacks=[recorded], resume=True, **rules)
        train(trainer, stream, max_steps=steps)
    manifests = CheckpointStore(str(tmp_path)).manifests()
    assert [manifest.step for manifest in manifests] == [2, 4, 5, 10]  # the run resumed from step 5
    assert [manifest.metrics["eval_loss"] for manifest in manifests[:2]] == [value for value, *_ in recorded.seen[:2]]


def test_the_best_checkpoint_by_a_training_value_is_saved_after_each_epoch(tmp_path: Path) -> None:
    class Saved(CheckpointMixin, Trainer): ...

    options: Any = {"checkpoint_dir": tmp_path, "checkpoint_every": None}
    trainer = Saved(**tiny_parts(), **options, callbacks=[SaveBest("train_loss")])
    history = trainer.train(tiny_data(), max_steps=8, num_epochs=3)
    manifests = CheckpointStore(str(tmp_path)).manifests()
    assert {manifest.step: manifest.label for manifest in manifests} == {3: "train_loss", 6: "train_loss", 8: ""}
    assert manifests[1].metrics["train_loss"] == history[1].train_loss


@pytest.mark.parametrize("stream", [True, False])
def test_early_stopping_counts_each_evaluation(stream: bool) -> None:
    class Stopping(EarlyStoppingMixin, Trainer):
        early_stopping_min_delta = 100.0
        early_stopping_patience = 2

    trainer = Stopping(**tiny_parts())
    train(trainer, stream)
    assert trainer.progress.steps == 6


def test_an_evaluation_in_a_callback_is_not_compared() -> None:
    class Testing(Callback[TrainerCore]):
        @override
        def on_epoch_end(self, trainer: TrainerCore, record: EpochRecord) -> None:
            assert isinstance(trainer, Trainer)
            trainer.evaluate(tiny_data(1))

    best = RestoreBestWeights("eval_loss")
    trainer = Trainer(**tiny_parts(), callbacks=[best, Testing()])
    history = trainer.train(tiny_data(), tiny_data(), num_epochs=2)
    assert best.best_value == history[-1].eval_loss
