"""Batches of similar lengths: the order, its reproduction in runs, and what is refused."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ptacc import CheckpointMixin, SeedMixin, Trainer
from ptacc.errors import DataError, OptionError
from ptacc.samplers import LengthGrouped
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import run_ranks

SAMPLES, BATCH = 203, 4
LENGTHS = torch.randint(1, 500, (SAMPLES,), generator=torch.Generator().manual_seed(0))


def batches(lengths: Sequence[int] | Tensor = LENGTHS, **options: Any) -> list[Tensor]:
    sampler = LengthGrouped(lengths, BATCH, **options)
    return list(
        DataLoader(TensorDataset(torch.as_tensor(lengths)), batch_size=BATCH, sampler=sampler, collate_fn=stack)
    )


def stack(samples: list[tuple[Tensor]]) -> Tensor:
    return torch.stack([length for (length,) in samples])


def test_each_sample_comes_once_in_an_epoch() -> None:
    for group in (1, 3, 50, 1000):
        assert sorted(LengthGrouped(LENGTHS, BATCH, batches_per_group=group)) == list(range(SAMPLES))


def test_the_samples_of_a_batch_have_similar_lengths() -> None:
    padding = [
        sum(float((len(b) * b.max() - b.sum()) / LENGTHS.sum()) for b in batches(batches_per_group=n)) for n in (1, 50)
    ]
    assert padding[0] > 0.5
    assert padding[1] < 0.03


def test_of_the_full_batches_that_with_the_longest_sample_comes_first_and_a_smaller_one_last() -> None:
    for _ in range(5):
        *full, last = batches(batches_per_group=5)
        assert full[0].max() == torch.cat(full).max()
        assert len(last) == SAMPLES % BATCH


def test_each_epoch_has_another_order_of_batches_and_other_batches() -> None:
    one, other = ([tuple(batch.tolist()) for batch in batches(batches_per_group=5)] for _ in range(2))
    assert len({*one} & {*other}) < len(one) / 4


@pytest.mark.parametrize("samples", [1, 3, 4, 5])
def test_small_datasets_are_sampled(samples: int) -> None:
    assert sorted(LengthGrouped([5] * samples, BATCH)) == list(range(samples))


@pytest.mark.parametrize("lengths", [[], [1.5], [[1, 2]], [3, -1]])
def test_what_is_not_a_length_is_refused(lengths: Any) -> None:
    with pytest.raises(DataError, match="must be the length of each sample, integers of at least 0"):
        LengthGrouped(lengths, BATCH)


def test_a_batch_has_a_sample() -> None:
    with pytest.raises(OptionError, match="batch_size=0"):
        LengthGrouped([1], 0)


class Saving(CheckpointMixin, SeedMixin, Trainer):
    seed: int | None = 3


def losses(directory: Path, *, steps: int = 12, batch: int = 4, **options: Any) -> list[float]:
    trainer = Saving(**tiny_parts(), checkpoint_dir=directory, **options)
    kwargs: Any = {"sampler": LengthGrouped(LENGTHS[:24], 4)}
    run = trainer.train(tiny_data(24), max_steps=steps, per_device_batch_size=batch, train_dataloader_kwargs=kwargs)
    return [step.loss for step in run.steps]


@pytest.mark.parametrize("steps", [3, 6, 8])
def test_a_resumed_run_has_the_same_order(tmp_path: Path, steps: int) -> None:
    losses(tmp_path / "run", steps=steps)
    assert losses(tmp_path / "run", resume=True) == losses(tmp_path / "whole")


def test_processes_train_on_the_order_of_one(tmp_path: Path) -> None:
    together = run_ranks(lambda: losses(tmp_path / "two", batch=2), 2, timeout=60)
    assert together[0] == together[1] == pytest.approx(losses(tmp_path / "one"))
