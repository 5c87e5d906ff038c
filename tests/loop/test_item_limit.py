"""A run that ends after a number of items: `max_items`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import IterableDataset
from typing_extensions import override

from ptacc import CheckpointMixin, LRSchedulerMixin, Pair, RunPlan, SeedMixin, Steps, Trainer
from ptacc.errors import OptionError
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import run_ranks


class Ordered(SeedMixin, Trainer):
    seed: int | None = 3


class Saving(CheckpointMixin, Ordered): ...


class Endless(IterableDataset[Pair]):
    @override
    def __iter__(self) -> Iterator[Pair]:
        while True:
            yield torch.ones(4, dtype=torch.float64), torch.tensor(1)


def train(kind: Any = Ordered, *, batch: int = 4, data: Any = None, limits: Any = None, **options: Any) -> Trainer:
    trainer: Trainer = kind(**tiny_parts(), **options)
    limits = limits or {"max_items": 50}
    trainer.train(data or tiny_data(22), tiny_data(4), per_device_batch_size=batch, **limits)
    return trainer


def weights(trainer: Trainer) -> list[float]:
    return torch.cat([weight.detach().flatten() for weight in trainer.unwrapped_model.parameters()]).tolist()


def test_the_first_step_that_reaches_the_items_is_the_last_one() -> None:
    items = [step.items for step in train().history.steps]
    assert items == [4, 4, 4, 4, 4, 2] * 2 + [4, 4]
    assert sum(items[:-1]) < 50 <= sum(items)


def test_the_run_is_that_of_as_many_steps() -> None:
    by_items, by_steps = train(), train(limits={"max_steps": 14})
    assert by_items.history.stop_reason is None
    assert [record.step for record in by_items.history.evaluations] == [6, 12, 14]
    assert weights(by_items) == weights(by_steps)


def test_it_ends_at_the_first_limit_of_several() -> None:
    for limits in ({"max_items": 50, "num_epochs": 1}, {"max_items": 22, "num_epochs": 3}):
        assert train(limits=limits).progress.items == 22


def test_an_endless_stream_ends() -> None:
    assert train(data=Endless()).progress.items == 52


def test_processes_count_together() -> None:
    results = run_ranks(lambda: (weights(trainer := train(batch=2)), trainer.progress.steps), 2, timeout=60)
    expected = train()
    assert results[0] == results[1]
    assert results[0][1] == expected.progress.steps == 14
    assert results[0][0] == pytest.approx(weights(expected), rel=1e-12)


def test_a_run_resumes_exactly_at_each_step(tmp_path: Path) -> None:
    whole = train(Saving, checkpoint_dir=tmp_path / "whole", checkpoint_every=Steps(1), keep_last=None)
    for step in range(1, 15):
        start = tmp_path / "whole" / f"step-{step:08}"
        resumed = train(Saving, checkpoint_dir=tmp_path / f"{step}", resume=start)
        assert weights(resumed) == weights(whole)
        assert resumed.progress.items == whole.progress.items


def test_a_finished_run_continues_with_a_larger_number(tmp_path: Path) -> None:
    train(Saving, checkpoint_dir=tmp_path)
    longer = train(Saving, checkpoint_dir=tmp_path, resume=True, limits={"max_items": 80})
    assert weights(longer) == weights(train(limits={"max_items": 80}))


class Scheduled(LRSchedulerMixin, Trainer): ...


def falling(optimizer: Optimizer, plan: RunPlan) -> LinearLR:
    return LinearLR(optimizer, 1.0, 0.0, total_iters=plan.total_steps)


def test_a_schedule_of_the_length_of_the_run_needs_steps() -> None:
    with pytest.raises(OptionError, match=r"RunPlan.total_steps: not known .* Give max_steps to train\(\)"):
        train(Scheduled, create_scheduler=falling)
    assert train(Scheduled, create_scheduler=falling, limits={"max_items": 50, "max_steps": 30}).progress.steps == 14


@pytest.mark.parametrize("value", [0, -1, True, float("inf"), "50"])
def test_a_wrong_number_of_items_is_an_error(value: Any) -> None:
    with pytest.raises(OptionError, match=r"train\(max_items=.*\): must be a finite number above 0"):
        train(limits={"max_items": value})


def test_items_are_what_the_trainer_counts() -> None:
    class Tokens(Trainer):
        @override
        def count_items(self, batch: Pair) -> float:
            return 10 * len(batch[0])

    assert train(Tokens, limits={"max_items": 100}).progress.steps == 3
