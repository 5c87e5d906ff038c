"""Map-style data: set-up reads none of it, and an error names what is wrong with it."""

import multiprocessing
import os
from collections.abc import Iterator, Sized
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler
from torch.utils.data import default_collate as torch_default_collate
from typing_extensions import override

from ptacc import StepOutput, Trainer
from ptacc.data.loading import default_collate
from ptacc.data.sources import make_source
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import DataError

Sample = tuple[Tensor, Tensor]


class Zeros(Dataset[Sample]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    @override
    def __getitem__(self, index: int) -> Sample:
        return torch.zeros(1), torch.zeros(1)


class Endless(Sampler[int]):
    """Draws on and on, and says that an epoch has as many draws as the data has samples."""

    def __init__(self, source: Sized) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    @override
    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(len(self.source)).tolist()


def make(kind: type[Trainer] = Trainer) -> Trainer:
    net = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return kind(net, loss_func=nn.MSELoss(), optimizer=optimizer, default_callbacks=())


@pytest.mark.parametrize("workers", [0, 2])
def test_set_up_reads_no_sample(workers: int) -> None:
    main = os.getpid()

    class ReadByWorkers(Zeros):
        @override
        def __getitem__(self, index: int) -> Sample:
            assert os.getpid() != main, "read in the main process"
            return super().__getitem__(index)

    data = ReadByWorkers(8)
    settings: Any = {"num_workers": workers, "timeout": 30 * (workers > 0)}
    trainer = make()
    trainer.explain(data)
    make_source(DataLoader(data), DistributedRuntime(), 0)
    if workers:
        trainer.train(data, data, num_epochs=1, train_dataloader_kwargs=settings, eval_dataloader_kwargs=settings)
        trainer.evaluate(data, dataloader_kwargs=settings)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_length_above_the_number_of_samples_is_an_error(workers: int) -> None:
    class Short(Zeros):
        @override
        def __getitem__(self, index: int) -> Sample:
            return [super().__getitem__(0)][index]

    kwargs: Any = {"num_workers": workers, "timeout": 30 * workers, "shuffle": False}
    with pytest.raises(DataError, match=r"Short says it has 6 samples, and asked for an index up to 5 it raises Index"):
        make().train(Short(6), num_epochs=1, train_dataloader_kwargs=kwargs)


def test_so_is_a_key_above_the_number_of_samples() -> None:
    class ByKey(Zeros):
        @override
        def __getitem__(self, index: int) -> Sample:
            return {0: super().__getitem__(0)}[index]

    with pytest.raises(DataError, match=r"ByKey says it has 2 samples, and asked for an index up to 1 it raises KeyE"):
        make().train(ByKey(2), num_epochs=1, train_dataloader_kwargs={"shuffle": False})


def test_a_key_error_of_the_datasets_own_is_raised_as_it_is() -> None:
    class Labelled(Zeros):
        @override
        def __getitem__(self, index: int) -> Sample:
            return torch.zeros(1), {"cat": torch.zeros(1)}["dog"]

    with pytest.raises(KeyError, match="dog"):
        make().train(Labelled(2), num_epochs=1)


def test_an_index_out_of_range_is_blamed_on_the_sampler() -> None:
    data = [(torch.zeros(1), torch.zeros(1))] * 2
    loader: DataLoader[Any] = DataLoader(data, sampler=[0, 9])  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"The sampler gives the index 9, for which list of 2 samples has none"):
        make().train(loader, num_epochs=1)


@pytest.mark.parametrize("error", [TypeError, NotImplementedError])
def test_a_length_that_raises_as_torchs_do_is_refused_by_name(error: type[Exception]) -> None:
    class Lengthless(Zeros):
        @override
        def __len__(self) -> int:
            raise error

    for call in (make().evaluate, lambda data: make().train(data, num_epochs=1)):
        with pytest.raises(DataError, match="Lengthless is not a dataset: it needs __len__"):
            call(Lengthless(2))


@pytest.mark.parametrize("in_batches", [False, True])
def test_an_epoch_of_a_sampler_without_end_is_as_long_as_it_says(in_batches: bool) -> None:
    class Seeing(Trainer):
        @override
        def train_step(self, batch: Any) -> StepOutput[Tensor]:
            seen.extend(batch[0].flatten().tolist())
            return super().train_step(batch)

    data: Any = [(torch.tensor([float(i)]), torch.zeros(1)) for i in range(6)]
    seen, net = list[float](), nn.Linear(1, 1)
    loader: DataLoader[Any] = DataLoader(data, batch_size=3, sampler=Endless(data))
    if in_batches:
        loader = DataLoader(data, batch_sampler=BatchSampler(Endless(data), 3, drop_last=False))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    history = Seeing(net, loss_func=nn.MSELoss(), optimizer=optimizer, default_callbacks=()).train(loader, num_epochs=2)
    assert history[-1].step == 4
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))


@pytest.mark.parametrize("in_batches", [False, True])
def test_a_sampler_that_is_cut_off_is_warned_of(in_batches: bool) -> None:
    class Understated(Endless):
        @override
        def __len__(self) -> int:
            return 2

        @override
        def __iter__(self) -> Iterator[int]:
            return iter(range(24))

    sampler: Any = Understated(Zeros(24))
    loader: DataLoader[Any] = DataLoader(Zeros(24), batch_size=2, sampler=sampler)
    if in_batches:
        loader = DataLoader(Zeros(24), batch_sampler=BatchSampler(sampler, 1, drop_last=False))
    words = "(?:Understated|BatchSampler) has a length of 2 .*gave 20 .* a dataset of 24 .*correct its __len__"
    with pytest.warns(UserWarning, match=words):
        batches = list(make_source(loader, DistributedRuntime(), 0).epoch(0))
    assert sum(len(batch.data[0]) for batch in batches) == 2


def test_a_virtual_length_costs_neither_time_nor_memory() -> None:
    history = make().train(Zeros(1 << 60), max_steps=3, train_dataloader_kwargs={"shuffle": False})
    assert history[-1].step == 3


@pytest.mark.parametrize("steps", [3, 4])
def test_workers_end_with_the_run(steps: int) -> None:
    before = set(multiprocessing.active_children())
    kwargs: Any = {"num_workers": 1, "persistent_workers": True, "timeout": 30}
    trainer = make()
    options: Any = {"train_dataloader_kwargs": kwargs, "eval_dataloader_kwargs": kwargs}
    trainer.train(Zeros(16), Zeros(8), max_steps=steps, **options)
    assert trainer.has_run
    assert set(multiprocessing.active_children()) <= before


def test_workers_end_with_a_run_that_fails() -> None:
    class Failing(Trainer):
        @override
        def train_step(self, batch: Any) -> StepOutput[Tensor]:
            if self.progress.epochs == 1:
                raise RuntimeError("broken")
            return super().train_step(batch)

    before = set(multiprocessing.active_children())
    kwargs: Any = {"num_workers": 1, "persistent_workers": True, "timeout": 30}
    with pytest.raises(RuntimeError, match="broken"):
        make(Failing).train(Zeros(16), num_epochs=2, train_dataloader_kwargs=kwargs)
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize("keys", [["a", "b", "c"], [(0, "a"), (0, "b"), (1, "a")]])
def test_samples_may_have_keys_that_are_not_numbers(keys: list[Any]) -> None:
    class ByKey(Zeros):
        @override
        def __getitem__(self, index: Any) -> Sample:
            return torch.tensor([float(keys.index(index))]), torch.zeros(1)

    loader: DataLoader[object] = DataLoader(ByKey(3), batch_size=2, sampler=keys[::-1])
    trainer = make()
    trainer.train(loader, num_epochs=1)
    with torch.no_grad():
        expected = [trainer.model(torch.tensor([float(place)])) for place in (2, 1, 0)]
    torch.testing.assert_close(trainer.predict(loader), expected)


def test_a_sampler_without_a_length_is_refused() -> None:
    class Unsized(Sampler[int]):
        @override
        def __iter__(self) -> Iterator[int]:
            return iter(range(8))

    loader: DataLoader[Any] = DataLoader([torch.ones(4)] * 8, sampler=Unsized())  # type: ignore[arg-type]
    with pytest.raises(DataError, match="Unsized has no length: a run is planned by the batches of an epoch"):
        make_source(loader, DistributedRuntime(), 7).num_batches()


class OwnPair(tuple[Tensor, int]):
    """A tuple of a class of one's own."""


class Named(NamedTuple):
    inputs: Tensor
    target: int


@pytest.mark.parametrize(("kind", "expected"), [(tuple, tuple), (OwnPair, tuple), (list, list)])
def test_samples_are_collated_as_torch_does_except_that_tuples_stay_tuples(kind: Any, expected: type) -> None:
    samples = [kind((torch.ones(2) * number, number)) for number in range(3)]
    collated: Any = default_collate(samples)
    by_torch: Any = torch_default_collate(samples)
    for field, theirs in zip(collated, by_torch, strict=True):
        assert torch.equal(field, theirs)
    assert type(collated) is expected


def test_named_tuples_stay_named_and_differing_lengths_have_torchs_message() -> None:
    assert isinstance(default_collate([Named(torch.ones(2), 1), Named(torch.zeros(2), 0)]), Named)
    with pytest.raises(RuntimeError, match="each element in list of batch should be of equal size"):
        default_collate([(1, 2), (1,)])
