"""The order of large data is computed, and as good as one that is drawn."""

import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from typing_extensions import override

from ptacc import Trainer
from ptacc.data.shuffling import BLOCK, MAX_IN_MEMORY, ComputedPermutation
from ptacc.testing import epoch_order

LARGE = MAX_IN_MEMORY + 7


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 10_007])
def test_each_number_comes_once(n: int) -> None:
    assert sorted(ComputedPermutation(n, n)[:]) == list(range(n))


def test_each_sample_of_large_data_comes_once_in_an_epoch() -> None:
    order = np.array(epoch_order(1, 0, LARGE))
    assert np.array_equal(np.sort(order), np.arange(LARGE))


def test_the_order_of_large_data_is_stable_across_versions() -> None:
    """A run that an earlier version saved resumes in the same order."""
    assert ComputedPermutation(0, 10**9)[:4].tolist() == [199841257, 598151598, 284770655, 29228011]
    assert ComputedPermutation(5, 10**12)[10**11 : 10**11 + 3].tolist() == [419562508065, 749293268571, 721686258765]


@pytest.mark.parametrize("start", [0, 1, BLOCK - 3, BLOCK, 5 * BLOCK + 11, LARGE - 10, LARGE])
def test_any_part_is_that_of_the_whole(start: int) -> None:
    whole, part = ComputedPermutation(3, LARGE)[:], ComputedPermutation(3, LARGE)
    for stop in (start, start + 1, start + 40, start + 2 * BLOCK, start + 5):
        assert np.array_equal(part[start:stop], whole[start:stop])


def test_the_orders_of_epochs_and_of_seeds_differ() -> None:
    orders = [epoch_order(seed, epoch, LARGE)[:100] for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def chi_square(observed: Sequence[float]) -> float:
    """Return the deviation from a uniform distribution, in standard deviations of chi-square."""
    counts = np.array(observed)
    expected, freedom = counts.mean(), len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("n", [1_000, 1_024, 1_000_003])
def test_a_sample_is_as_often_at_each_place(n: int) -> None:
    """Over many seeds, what comes first, what follows on it, and the distance between the two are uniform."""
    pairs = np.array([ComputedPermutation(seed, n)[:2] for seed in range(4_000)])
    first, second = pairs.T
    for numbers in (first, second, (second - first) % n):
        assert abs(chi_square(np.histogram(numbers, bins=50, range=(0, n))[0].tolist())) < 4


def test_neighbours_in_an_epoch_are_unrelated() -> None:
    order = ComputedPermutation(0, 1 << 24)[: 1 << 18].astype(np.float64) / (1 << 24)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.01
    cells = np.histogram2d(order[:-1], order[1:], bins=32)[0]
    assert abs(chi_square(cells.flatten().tolist())) < 5


class Virtual(Dataset[tuple[Tensor, Tensor]]):
    """A billion samples, computed when they are asked for."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.seen: list[int] = []

    def __len__(self) -> int:
        return self.length

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.seen.append(index)
        return torch.full((3,), index / self.length), torch.zeros(1)


def test_a_run_over_a_billion_samples_holds_no_order_of_them() -> None:
    data, net = Virtual(10**9), nn.Linear(3, 1)
    trainer = Trainer(net, loss_func=nn.MSELoss(), optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
    tracemalloc.start()
    try:
        trainer.train(data, max_steps=3, per_device_batch_size=4)
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()
    assert len(set(data.seen)) == 12
    assert max(data.seen) > 10**8
