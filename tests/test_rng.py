import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.random import mtrand

from ptacc.rng import RandomStreams, derive_seed, preserved_streams, streams_seeded
from ptacc.testing import epoch_order
from tests.checkpoint.test_parts import through_files


def draw() -> list[float]:
    """Draw from each generator. NumPy's then holds the second of a pair of normal numbers."""
    return [random.random(), random.gauss(), np.random.normal(), float(torch.randn(()))]  # noqa: NPY002


def test_the_generators_are_restored_from_a_file(tmp_path: Path) -> None:
    draw()
    state = through_files(tmp_path, {"random": RandomStreams().state_dict()})["random"]
    expected = [draw(), draw()]
    RandomStreams().load_state_dict(state)
    assert [draw(), draw()] == expected


@pytest.mark.parametrize("context", [preserved_streams, lambda: streams_seeded(3)])
def test_a_block_restores_the_generators(context: Callable[[], AbstractContextManager[None]]) -> None:
    RandomStreams().load_state_dict(before := RandomStreams().state_dict())
    expected = draw()
    RandomStreams().load_state_dict(before)
    with context():
        draw()
    assert draw() == expected


def test_the_generator_of_the_own_accelerator_alone_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {torch.device("cuda", index): torch.tensor([index]) for index in range(3)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", states.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))
    saved = RandomStreams(torch.device("cuda", 1)).state_dict()
    RandomStreams(torch.device("cpu")).load_state_dict(saved)
    assert [int(state) for state in states.values()] == [0, 1, 2]
    RandomStreams(torch.device("cuda", 2)).load_state_dict(saved)  # another process of another launch
    assert [int(state) for state in states.values()] == [0, 1, 1]


def test_seeds_of_neighbouring_paths_differ() -> None:
    seeds = [derive_seed(seed, epoch, batch) for seed in range(4) for epoch in range(4) for batch in range(4)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_order_of_samples_is_stable_across_versions() -> None:
    """A run that an earlier version saved resumes in the same order."""
    assert epoch_order(0, 0, 8) == [3, 1, 4, 5, 7, 0, 2, 6]
    assert epoch_order(7, 3, 10) == [5, 9, 8, 3, 1, 4, 7, 6, 0, 2]
    assert derive_seed(0, 1, 2) == 4450782424123420391


def draws_of_numpy(loads: Sequence[int], normals_in_loading: int) -> list[float]:
    """Draw normals from NumPy, and load a batch before some of them."""
    np.random.seed(3)  # noqa: NPY002
    drawn = []
    for index in range(9):
        if index in loads:
            with streams_seeded(index):
                np.random.normal(size=normals_in_loading)  # noqa: NPY002
        drawn.append(float(np.random.normal()))  # noqa: NPY002
    return drawn


@pytest.mark.parametrize("normals_in_loading", [0, 1, 2, 700])
@pytest.mark.parametrize("loads", [[0], [1], [0, 1], [1, 2, 3], [2, 2, 5, 8], range(9)])
def test_loading_keeps_the_second_normal_number_of_a_pair(loads: Sequence[int], normals_in_loading: int) -> None:
    assert draws_of_numpy(loads, normals_in_loading) == draws_of_numpy([], 0)


def test_seeded_blocks_may_be_nested() -> None:
    def drawn(*, nested: bool) -> list[float]:
        with streams_seeded(1):
            first = draw()
            if nested:
                with streams_seeded(2):
                    draw()
            return first + draw()

    assert drawn(nested=True) == drawn(nested=False)


def test_loading_does_not_depend_on_numpys_state() -> None:
    def loaded(before: int) -> tuple[float, int]:
        np.random.seed(before)  # noqa: NPY002
        np.random.normal(size=before)  # noqa: NPY002
        with streams_seeded(5):
            return float(np.random.normal()), random.randrange(2**32)  # noqa: NPY002

    assert len({loaded(before) for before in range(5)}) == 1


def test_another_type_of_bit_generator_is_restored() -> None:
    own = mtrand.get_bit_generator()
    try:
        mtrand.set_bit_generator(np.random.PCG64(1))
        expected = [float(np.random.normal()) for _ in range(4)]  # noqa: NPY002
        mtrand.set_bit_generator(np.random.PCG64(1))
        drawn = []
        for index in range(4):
            with streams_seeded(index):
                np.random.normal()  # noqa: NPY002
            drawn.append(float(np.random.normal()))  # noqa: NPY002
        assert drawn == expected
    finally:
        mtrand.set_bit_generator(own)
