"""Loading seeds the global generators that a dataset draws from, and costs the others nothing."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from ptacc.data.batch import BatchSource
from ptacc.data.dataloader_config import DataLoaderConfig
from ptacc.data.seeding import CHECK_EVERY
from ptacc.data.sources import make_source
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.rng import RandomStreams, preserved_streams
from ptacc.testing.laws import same

BATCHES = 3 * CHECK_EVERY
DRAWS: dict[str, Callable[[], float]] = {
    "python": random.random,
    "python gauss": random.gauss,
    "numpy": np.random.random_sample,
    "numpy normal": np.random.standard_normal,
    "torch": lambda: float(torch.rand(())),
    "all": lambda: random.random() + np.random.random_sample() + float(torch.rand(())),  # noqa: NPY002
}


class Drawing(Dataset[Tensor]):
    """One sample a batch, which draws for some indices."""

    def __init__(self, draw: Callable[[], float], draws_for: Callable[[int], bool] = lambda index: True) -> None:
        self.draw, self.draws_for = draw, draws_for

    def __len__(self) -> int:
        return BATCHES

    @override
    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, self.draw() if self.draws_for(index) else 0.0], dtype=torch.float64)


def source_of(dataset: Dataset[Tensor], workers: int = 0, **options: Any) -> BatchSource:
    kwargs: Any = {"num_workers": workers, "timeout": 30.0 * workers}
    return make_source(
        DataLoaderConfig(dataset, 1, None, kwargs).build(shuffle=False), DistributedRuntime(), 7, **options
    )


def values(source: BatchSource, start: int = 0) -> list[float]:
    return [batch.data[0, 1].item() for batch in source.epoch(0, start)]


@pytest.mark.parametrize("draw", DRAWS)
def test_each_batch_draws_the_same_numbers_in_this_process_and_in_workers(draw: str) -> None:
    here, there = (values(source_of(Drawing(DRAWS[draw]), workers)) for workers in (0, 2))
    assert here == there
    assert len(set(here)) == BATCHES


@pytest.mark.parametrize("draw", DRAWS)
def test_a_dataset_that_draws_does_not_change_the_global_generators(draw: str) -> None:
    with preserved_streams():
        before = RandomStreams().state_dict()
        values(source_of(Drawing(DRAWS[draw])))
        assert same(before, RandomStreams().state_dict())


@pytest.mark.parametrize("draw", DRAWS)
def test_a_dataset_that_begins_to_draw_later_is_noticed_within_some_batches(draw: str) -> None:
    dataset = Drawing(DRAWS[draw], lambda index: index > 10)
    with preserved_streams():
        here, there = (values(source_of(dataset, workers)) for workers in (0, 1))
    assert here[:CHECK_EVERY] != there[:CHECK_EVERY]
    assert here[CHECK_EVERY:] == there[CHECK_EVERY:]


@pytest.mark.parametrize("is_training", [True, False])
def test_every_batch_is_seeded_on_request(is_training: bool) -> None:
    dataset = Drawing(DRAWS["all"], lambda index: index % 50 == 3)
    options = {"seed_every_batch": True, "is_training": is_training}
    here, there = (values(source_of(dataset, workers, **options)) for workers in (0, 1))
    assert here == there


def test_an_evaluation_does_not_depend_on_those_before_it() -> None:
    """A resumed run has not made them."""
    source = source_of(Drawing(DRAWS["torch"], lambda index: index > 10), is_training=False)
    torch.manual_seed(0)
    first = values(source)
    torch.manual_seed(0)
    assert values(source) == first


def test_a_batch_that_is_not_seeded_draws_from_the_generators_of_the_run() -> None:
    dataset = Drawing(DRAWS["python"], lambda index: index == 5)
    with preserved_streams():
        random.seed(3)
        assert values(source_of(dataset))[5] == random.Random(3).random()


def test_a_resumed_epoch_knows_what_has_drawn() -> None:
    def until_70(workers: int) -> BatchSource:
        source = source_of(Drawing(DRAWS["all"]), workers)
        for _, _ in zip(range(70), source.epoch(0), strict=False):
            pass
        return source

    expected = values(source_of(Drawing(DRAWS["all"])))[70:]
    for workers in (0, 1):  # workers do not find it out
        resumed = source_of(Drawing(DRAWS["all"]))
        resumed.load_state_dict(until_70(workers).state_dict())
        assert values(resumed, start=70) == expected
