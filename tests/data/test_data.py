"""From datasets and DataLoaders to the batches of each rank."""

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from typing_extensions import override

from ptacc.data.batch import BatchSource, HostBatch
from ptacc.data.dataloader_config import DataLoaderConfig
from ptacc.data.replay import compute_digest
from ptacc.data.sources import make_source
from ptacc.data.wrappers import PaddedSource
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import DataError
from ptacc.testing import epoch_order
from ptacc.types.arguments import DataLoaderKwargs


class Numbers(Dataset[int]):
    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    @override
    def __getitem__(self, index: int) -> int:
        return index


class Noisy(Numbers):
    """Draws from all three global generators, as augmentation does."""

    @override
    def __getitem__(self, index: int) -> Any:
        return torch.tensor([index, random.random(), np.random.rand(), float(torch.rand(()))])  # noqa: NPY002


class Stream(IterableDataset[int]):
    def __init__(self, n: int) -> None:
        self.n, self.epochs = n, list[int]()

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    @override
    def __iter__(self) -> Iterator[int]:
        return iter(range(self.n))


class NoisyStream(Stream):
    @override
    def __iter__(self) -> Iterator[Any]:
        return (torch.tensor([i, random.random(), float(torch.rand(()))]) for i in range(self.n))


class Backwards(Sampler[int]):
    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    @override
    def __iter__(self) -> Iterator[int]:
        return reversed(range(self.n))


def fake_rank(rank: int, world_size: int) -> DistributedRuntime:
    """Return a rank of a launch that is not there, for code that does not communicate."""
    return DistributedRuntime(rank, world_size)


def batches(
    dataset: Dataset[Any],
    distributed: DistributedRuntime | None = None,
    *,
    epoch: int = 0,
    seed: int = 7,
    batch_size: int | None = 4,
    shuffle: bool = False,
    data_is_sharded: bool = False,
    limit: int | None = None,
    start: int = 0,
    **kwargs: Any,  # keywords of DataLoaderKwargs
) -> list[HostBatch[Any]]:
    request = DataLoaderConfig(dataset, batch_size, None, cast(DataLoaderKwargs, kwargs))
    source = make_source(
        request.build(shuffle=shuffle),
        distributed or DistributedRuntime(),
        seed,
        data_is_sharded=data_is_sharded,
        limit=limit,
    )
    return list(source.epoch(epoch, source.offset_after(start)))


def numbers(found: list[HostBatch[Any]]) -> list[int]:
    return [int(number) for batch in found if not batch.is_padding for number in batch.data.flatten()]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 16, 31])
@pytest.mark.parametrize("kind", [Numbers, Stream])
def test_every_sample_goes_to_one_rank_and_all_have_the_same_number_of_batches(
    kind: type[Numbers | Stream], n: int, world_size: int
) -> None:
    sharded = [batches(kind(n), fake_rank(rank, world_size)) for rank in range(world_size)]
    assert sorted(number for found in sharded for number in numbers(found)) == list(range(n))
    assert len({len(found) for found in sharded}) == 1
    for group in zip(*sharded, strict=True):
        assert sum(batch.samples or 0 for batch in group) == group[0].total


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_order_does_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    alone = batches(Numbers(32), batch_size=4 * world_size, shuffle=True)
    sharded = [batches(Numbers(32), fake_rank(rank, world_size), shuffle=True) for rank in range(world_size)]
    for full, *parts in zip(alone, *sharded, strict=True):
        assert full.data.tolist() == [number for part in parts for number in part.data.tolist()]


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    assert numbers(batches(Numbers(9), shuffle=True, epoch=3)) == epoch_order(7, 3, 9)
    assert epoch_order(7, 3, 9) != epoch_order(7, 4, 9) != epoch_order(8, 4, 9)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", [Noisy, NoisyStream])
def test_augmentation_is_the_same_with_any_number_of_workers(kind: type[Noisy | NoisyStream], workers: int) -> None:
    if kind is NoisyStream and workers > 1:
        pytest.skip("torch gives each worker the whole stream, unless the stream divides itself")
    here, there = batches(kind(10)), batches(kind(10), num_workers=workers, timeout=30.0)
    assert all(torch.equal(a.data, b.data) for a, b in zip(here, there, strict=True))


def test_augmentation_differs_between_epochs_and_repeats_with_the_seed() -> None:
    one, again, other = (batches(Noisy(4), epoch=epoch)[0].data for epoch in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one[:, 1:], other[:, 1:])


def test_loading_restores_the_global_generators() -> None:
    python, numpy, cpu = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002
    batches(Noisy(8), shuffle=True)
    batches(NoisyStream(8))
    assert random.getstate() == python
    assert (np.random.get_state()[1] == numpy).all()  # type: ignore[index]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), cpu)


@pytest.mark.parametrize("workers", [0, 2])
def test_persistent_workers_see_the_epoch_change(workers: int) -> None:
    kwargs: Any = {"num_workers": workers, "persistent_workers": workers > 0}
    source = make_source(DataLoaderConfig(Noisy(8), 4, None, kwargs).build(shuffle=True), DistributedRuntime(), seed=1)
    first, second = ([batch.data for batch in source.epoch(epoch)] for epoch in (0, 1))
    fresh = make_source(DataLoaderConfig(Noisy(8), 4, None, {}).build(shuffle=True), DistributedRuntime(), seed=1)
    assert all(map(torch.equal, second, (batch.data for batch in fresh.epoch(1))))
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("start", [1, 3, 5])
@pytest.mark.parametrize("kind", [Noisy, NoisyStream])
@pytest.mark.parametrize("limit", [None, 4])
def test_an_epoch_resumed_at_a_batch_gives_the_same_batches(
    kind: type[Noisy | NoisyStream], start: int, workers: int, limit: int | None
) -> None:
    setting: Any = {"shuffle": kind is Noisy, "epoch": 2, "limit": limit}
    for rank in range(2):
        full = batches(kind(37), fake_rank(rank, 2), **setting)
        rest = batches(
            kind(37), fake_rank(rank, 2), **setting, start=start, num_workers=workers, timeout=30.0 * workers
        )
        assert len(rest) == max(len(full) - start, 0)
        for expected, batch in zip(full[start:], rest, strict=True):
            assert replace(batch, data=None) == replace(expected, data=None)
            assert torch.equal(batch.data, expected.data)


def test_a_resumed_epoch_loads_no_earlier_samples() -> None:
    class Recording(Numbers):
        loaded: list[int]

        @override
        def __getitem__(self, index: int) -> int:
            self.loaded.append(index)
            return index

    dataset = Recording(16)
    dataset.loaded = []
    batches(dataset, start=3)
    assert set(dataset.loaded) == {12, 13, 14, 15}


def test_a_stream_receives_its_epoch() -> None:
    stream = Stream(4)
    batches(stream, epoch=5)
    assert stream.epochs == [5]


def test_a_users_sampler_is_used() -> None:
    assert numbers(batches(Numbers(7), sampler=Backwards(7))) == [6, 5, 4, 3, 2, 1, 0]


def test_a_users_random_sampler_is_reproducible() -> None:
    sampler = WeightedRandomSampler([1.0] * 6 + [50.0], num_samples=14)
    found = [numbers(batches(Numbers(7), sampler=sampler, epoch=epoch)) for epoch in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert len(found[0]) == 14


def test_a_users_batch_sampler_is_used() -> None:
    sampler = BatchSampler(Backwards(7), batch_size=3, drop_last=False)
    found = batches(Numbers(7), batch_size=None, batch_sampler=sampler)
    assert [batch.data.tolist() for batch in found] == [[6, 5, 4], [3, 2, 1], [0]]


def test_drop_last_drops_the_global_batch_that_is_not_full() -> None:
    sharded = [batches(Numbers(13), fake_rank(rank, 2), batch_size=3, drop_last=True) for rank in range(2)]
    assert [[batch.data.tolist() for batch in found] for found in sharded] == [
        [[0, 1, 2], [6, 7, 8]],
        [[3, 4, 5], [9, 10, 11]],
    ]


class OneByOne(TensorDataset):
    """Counts the samples that are loaded one by one."""

    loaded: ClassVar[int] = 0

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        OneByOne.loaded += 1
        return tuple(tensor[index] for tensor in self.tensors)


@pytest.mark.parametrize("part", [None, [7, 1, 8, 2, 9, 0]])
def test_indexing_tensors_in_memory_together_gives_the_same_batches(part: list[int] | None) -> None:
    tensors = torch.randn(10, 3), torch.arange(10)
    data: list[TensorDataset] = [kind(*tensors) for kind in (TensorDataset, OneByOne)]
    before = OneByOne.loaded
    parts: list[Any] = data if part is None else [Subset(Subset(full, part), range(1, 6)) for full in data]
    together, one_by_one = (batches(dataset, shuffle=True) for dataset in parts)
    assert OneByOne.loaded - before >= len(parts[1])
    for left, right in zip(together, one_by_one, strict=True):
        assert isinstance(left.data, tuple)
        assert isinstance(right.data, tuple)
        assert all(map(torch.equal, left.data, right.data))


def test_batches_indexed_together_share_no_memory() -> None:
    data = TensorDataset(torch.ones(10, 3), torch.arange(10))
    first, second, _ = (batch.data for batch in batches(data))
    first[0].zero_()
    assert second[0]._version == 0  # noqa: SLF001
    assert torch.equal(second[0], torch.ones(4, 3))
    assert torch.equal(data.tensors[0], torch.ones(10, 3))


@pytest.mark.parametrize(("rows", "columns"), [(3, 6), (5, 7), (4, 16), (1, 1)])
def test_memory_of_a_batch_is_aligned_wherever_loading_started(rows: int, columns: int) -> None:
    data = TensorDataset(torch.randn(16, columns), torch.randn(16))
    for start in range(3):
        for batch in batches(data, batch_size=rows, start=start):
            assert [tensor.data_ptr() % 64 for tensor in batch.data] == [0, 0]


def test_changes_to_the_data_are_in_the_next_batch() -> None:
    data = TensorDataset(torch.zeros(12, 2), torch.arange(12))
    loader = DataLoaderConfig(data, 4, None, {}).build(shuffle=False)
    seen = []
    for batch in make_source(loader, DistributedRuntime(), 7).epoch(0):
        seen.append(float(batch.data[0].sum()))
        data.tensors[0].add_(1)
    assert seen == [0, 8, 16]


def test_tensors_made_in_inference_mode_are_loaded() -> None:
    with torch.inference_mode():
        data = TensorDataset(torch.randn(6, 2), torch.arange(6))
    assert [batch.data[1].tolist() for batch in batches(data)] == [[0, 1, 2, 3], [4, 5]]


def test_tensors_in_memory_may_be_large_and_indices_negative() -> None:
    data = TensorDataset(torch.randn(6, 70_000), torch.arange(6))
    (left, right), _ = (batch.data for batch in batches(Subset(data, [-1, 0, -6, 3, 5])))
    assert torch.equal(left, data.tensors[0][[5, 0, 0, 3]])
    assert right.tolist() == [5, 0, 0, 3]


def test_a_limit_takes_the_first_batches() -> None:
    assert numbers(batches(Numbers(20), limit=2)) == list(range(8))
    source = make_source(DataLoader(Numbers(20), batch_size=4), DistributedRuntime(), 7, limit=2)
    assert numbers(list(source.epoch(0))) == list(range(8))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_batches_of_a_custom_loader_are_split_over_the_ranks(world_size: int) -> None:
    class Custom(DataLoader[Any]): ...

    loader = Custom(Numbers(10), batch_size=3)
    sharded = [list(make_source(loader, fake_rank(rank, world_size), 0).epoch(0)) for rank in range(world_size)]
    assert sorted(number for found in sharded for number in numbers(found)) == list(range(10))
    assert len({len(found) for found in sharded}) == 1


def test_a_loader_without_batching_gives_its_samples_as_batches() -> None:
    data = [torch.tensor([1.0]), torch.tensor([2.0, 3.0])]
    loader: DataLoader[Any] = DataLoader(data, batch_size=None)  # type: ignore[arg-type]  # a list will do
    assert [batch.data.tolist() for batch in make_source(loader, DistributedRuntime(), 0).epoch(0)] == [
        [1.0],
        [2.0, 3.0],
    ]


def test_the_settings_of_a_loader_are_kept() -> None:
    def collate(samples: list[int]) -> Tensor:
        return torch.tensor(samples) * 10

    loader = DataLoader(Numbers(5), batch_size=2, collate_fn=collate)
    assert [batch.data.tolist() for batch in make_source(loader, DistributedRuntime(), 0).epoch(0)] == [
        [0, 10],
        [20, 30],
        [40],
    ]


# ---- resuming


@pytest.mark.parametrize("sizes", [(4, 1), (2, 2), (1, 4), (3, 1)])
@pytest.mark.parametrize("start", [0, 4, 8, 30])
def test_the_rest_of_an_epoch_is_split_over_any_number_of_ranks(start: int, sizes: tuple[int, int]) -> None:
    batch_size, world_size = sizes
    sharded: list[list[HostBatch[Any]]] = []
    for rank in range(world_size):
        request = DataLoaderConfig(Numbers(31), batch_size, None, {})
        source = make_source(request.build(shuffle=True), fake_rank(rank, world_size), 7)
        sharded.append(list(source.epoch(2, start)))
        assert len(sharded[-1]) == source.num_batches(start)
        assert sharded[-1][-1].end == 31
    found = [number for group in zip(*sharded, strict=True) for batch in group for number in numbers([batch])]
    assert found == epoch_order(7, 2, 31)[start:]


class Drawing(Sampler[int]):
    """Draws its order from its own generator, whose state depends on the epochs before."""

    def __init__(self, n: int) -> None:
        self.n, self.generator = n, torch.Generator().manual_seed(3)

    @override
    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.n, generator=self.generator).tolist())

    def __len__(self) -> int:
        return self.n


class StatefulDrawing(Drawing):
    """Saves the state of the generator."""

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.generator.set_state(state_dict["generator"])


class CustomLoader(DataLoader[Any]):
    """A loader of another type, which is used as it is."""


@pytest.mark.parametrize("loader", [DataLoader, CustomLoader])
@pytest.mark.parametrize("kind", [Drawing, StatefulDrawing])
@pytest.mark.parametrize("start", [0, 8])
def test_a_users_order_is_resumed_in_a_later_epoch(
    start: int, kind: type[Drawing], loader: type[DataLoader[Any]]
) -> None:
    def source() -> BatchSource:
        return make_source(loader(Numbers(12), batch_size=4, sampler=kind(12)), DistributedRuntime(), 7)

    uninterrupted = source()
    offset = start if loader is DataLoader else start // 4
    epochs = [numbers(list(uninterrupted.epoch(epoch))) for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]

    left = source()
    for epoch in range(2):
        list(left.epoch(epoch))
    if start:
        for _ in zip(range(2), left.epoch(2), strict=False):
            pass
    rest = source()
    rest.load_state_dict(copy.deepcopy(left.state_dict()))
    assert numbers(list(rest.epoch(2, offset))) == epochs[2][start:]


def test_a_change_of_a_sampler_within_an_epoch_is_resumed() -> None:
    left, right = StatefulDrawing(12), StatefulDrawing(12)
    source, rest = (
        make_source(DataLoader(Numbers(12), batch_size=4, sampler=sampler), DistributedRuntime(), 7)
        for sampler in (left, right)
    )
    next(source.epoch(0))
    left.generator.manual_seed(11)
    rest.load_state_dict(copy.deepcopy(source.state_dict()))
    list(rest.epoch(0, 4))
    assert numbers(list(rest.epoch(1))) == numbers(list(source.epoch(1)))


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("kind", [DataLoader, CustomLoader])
def test_no_batches_are_left_behind_the_end(kind: type[DataLoader[Any]], limit: int | None) -> None:
    source = make_source(kind(Numbers(8), batch_size=4), DistributedRuntime(), 7, limit=limit)
    padded = PaddedSource(source, DistributedRuntime())
    padded.sync()
    assert [source.num_batches(source.offset_after(5)), padded.num_batches(5)] == [0, 0]


def test_a_replay_in_another_order_is_an_error() -> None:
    class Shifting(Stream):
        @override
        def __iter__(self) -> Iterator[int]:
            return iter([random.SystemRandom().randrange(10**9) for _ in range(self.n)])

    def source() -> BatchSource:
        return make_source(DataLoader(Shifting(12), batch_size=4), DistributedRuntime(), 7)

    left, again = source(), source()
    next(left.epoch(0))
    again.load_state_dict(left.state_dict())
    with pytest.raises(DataError, match=r"Shifting was read again .* gave another batch there"):
        next(again.epoch(0, 1))


def test_a_digest_covers_arrays_and_texts() -> None:
    batch = {"x": np.ones(2), "text": ["a", b"b", None]}
    digest = compute_digest(batch)
    assert compute_digest({"x": np.ones(2), "text": ["a", b"b", None]}) == digest
    assert digest not in (
        compute_digest({**batch, "x": np.zeros(2)}),
        compute_digest({**batch, "text": ["a", b"c", None]}),
    )


def test_a_stateful_stream_is_not_read_again() -> None:
    class StatefulStream(NoisyStream):
        position, read = 0, 0

        @override
        def __iter__(self) -> Iterator[Any]:
            for index in range(self.position, self.n):
                self.position, self.read = index + 1, self.read + 1
                yield torch.tensor([index, random.random()])
            self.position = 0

        def state_dict(self) -> dict[str, Any]:
            return {"position": self.position}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.position = state_dict["position"]

    expected = batches(StatefulStream(14))
    left, dataset = (
        make_source(DataLoader(StatefulStream(14), batch_size=4), DistributedRuntime(), 7),
        StatefulStream(14),
    )
    for _ in zip(range(2), left.epoch(0), strict=False):
        pass
    rest = make_source(DataLoader(dataset, batch_size=4), DistributedRuntime(), 7)
    rest.load_state_dict(copy.deepcopy(left.state_dict()))
    found = list(rest.epoch(0, 2))
    assert [batch.data.tolist() for batch in found] == [batch.data.tolist() for batch in expected[2:]]
    assert dataset.read == 6
