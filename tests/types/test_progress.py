"""A cadence in items: the same steps for any split over processes, and in a resumed run."""

from pathlib import Path
from typing import Any

import pytest

from ptacc import CheckpointMixin, Items, Trainer
from ptacc.errors import OptionError
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import run_ranks


class Saving(CheckpointMixin, Trainer): ...


def evaluated_steps(trainer: Trainer, *, batch: int = 8, epochs: int = 4) -> list[int]:
    options: dict[str, Any] = {"evaluate_every": Items(20), "per_device_batch_size": batch, "num_epochs": epochs}
    return [record.step for record in trainer.train(tiny_data(24), tiny_data(8), **options).evaluations]


def test_each_multiple_of_the_items_is_reached_once() -> None:
    items = [8 * step for step in evaluated_steps(Trainer(**tiny_parts()))]
    assert items == [24, 40, 64, 80, 96]  # the last is the end of the run


def test_processes_count_items_together() -> None:
    def train() -> list[int]:
        return evaluated_steps(Trainer(**tiny_parts()), batch=4)

    assert run_ranks(train, 2, timeout=60) == [evaluated_steps(Trainer(**tiny_parts()))] * 2


def test_a_resumed_run_continues_to_count(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint_dir": tmp_path, "checkpoint_every": Items(20)}
    evaluated_steps(Saving(**tiny_parts(), **options), epochs=4)
    middle = Saving(**tiny_parts(), checkpoint_dir=tmp_path / "again", resume=tmp_path / "step-00000005")
    assert evaluated_steps(middle) == evaluated_steps(Trainer(**tiny_parts()))
    saved = sorted(path.name for path in tmp_path.glob("step-*"))
    assert saved == [f"step-{step:08}" for step in (3, 5, 8, 10, 12)]


@pytest.mark.parametrize("count", [0, -1, "20", True])
def test_a_number_of_items_is_positive(count: Any) -> None:
    with pytest.raises(OptionError, match=r"Items\(n=.*\): must be a finite number above 0"):
        Items(count)
