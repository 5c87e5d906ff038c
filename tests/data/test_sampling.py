"""The description of a sampler tells whether a run that is resumed reads its data in the same order."""

from collections.abc import Sequence

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ptacc.data.sampling import describe_sampler

WEIGHTED = WeightedRandomSampler([1.0, 2.0, 3.0], 3)


@pytest.mark.parametrize(
    "other",
    [
        WeightedRandomSampler([1.0, 2.0, 4.0], 3),
        WeightedRandomSampler([1.0, 2.0, 3.0], 3, replacement=False),
        SubsetRandomSampler([0, 1, 2]),
        RandomSampler(range(3)),
    ],
)
def test_samplers_that_differ_have_different_descriptions(other: Sampler[int]) -> None:
    assert describe_sampler(other) != describe_sampler(WEIGHTED)


def test_equal_samplers_have_equal_descriptions() -> None:
    assert describe_sampler(WeightedRandomSampler([1, 2, 3], 3)) == describe_sampler(WEIGHTED)
    assert describe_sampler(SequentialSampler(range(3))) == "SequentialSampler()"
    assert describe_sampler(BatchSampler(RandomSampler(range(3)), 2, drop_last=True)) == "BatchSampler()"


@pytest.mark.parametrize(
    ("indices", "digest"),
    [
        ([3, 1, 2], "5a63f09ce8305289"),
        (torch.tensor([3, 1, 2]), "5a63f09ce8305289"),
        (["b", "a"], "272a12844247149e"),
        ([("b", 1), "a"], "51aad5ba782c5a25"),
    ],
)
def test_a_description_is_the_same_in_each_process(indices: Sequence[int], digest: str) -> None:
    assert describe_sampler(SubsetRandomSampler(indices)) == f"SubsetRandomSampler(indices={digest})"
