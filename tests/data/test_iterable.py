"""Streams that keep their own position, and streams with a length that workers share."""

import copy
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from typing_extensions import override

from ptacc import StepOutput, TrainingLoop
from ptacc.data.batch import BatchSource
from ptacc.data.sources import make_source
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import DataError


class Shuffled(IterableDataset[int]):
    """Keeps its position and its generator, from epoch to epoch, and resets its position at the end."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.random, self.fails_at = random.Random(3), fails_at
        self.position, self.order = 0, list[int]()

    @override
    def __iter__(self) -> Iterator[int]:
        if not self.position:
            self.order = self.random.sample(range(18), 18)
        for position in range(self.position, 18):
            if position == self.fails_at:
                raise OSError("the connection was lost")
            self.position = position + 1
            yield self.order[position]
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "order": self.order, "random": self.random.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self.order = state["position"], state["order"]
        self.random.setstate(state["random"])


class OneOff(Shuffled):
    """Is one sample off after its state was loaded."""

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({**state, "position": max(state["position"] - 1, 0)})


class Text(OneOff):
    @override
    def __iter__(self) -> Iterator[Any]:
        return map(str, super().__iter__())


class Unrepeatable(OneOff):
    """Is in another order whenever it is read from its beginning, too."""

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.random.seed(None)


def make(dataset: IterableDataset[Any], **options: Any) -> BatchSource:
    settings: dict[str, Any] = {"batch_size": 4, **options}
    return make_source(DataLoader(dataset, **settings), DistributedRuntime(), 7)


def read(source: BatchSource, epoch: int, start: int = 0, until: int | None = None) -> list[Any]:
    return [list(batch.data) for batch in islice(source.epoch(epoch, start), until)]


def resumed(source: BatchSource, dataset: IterableDataset[Any]) -> BatchSource:
    again = make(dataset)
    again.load_state_dict(copy.deepcopy(source.state_dict()))
    return again


@pytest.mark.parametrize("start", [0, 1, 4, 5])
def test_a_stream_whose_state_spans_epochs_resumes_in_each_of_them(start: int) -> None:
    whole, source = make(Shuffled()), make(Shuffled())
    expected = [read(whole, epoch) for epoch in range(3)]
    iterators = [source.epoch(0), source.epoch(1)]
    read_before = [len(list(iterators[0])), len(list(islice(iterators[1], start)))]
    rest = resumed(source, Shuffled())
    assert read_before == [5, start]
    assert [read(rest, 1, start), read(rest, 2)] == [expected[1][start:], expected[2]]


@pytest.mark.parametrize("kind", [OneOff, Text])
def test_a_state_that_leads_to_other_samples_is_replaced_by_a_replay(kind: type[Shuffled]) -> None:
    expected, source = read(make(kind()), 0), make(kind())
    batches = source.epoch(0)
    next(batches)
    next(batches)
    with pytest.warns(UserWarning, match=rf"{kind.__name__}.load_state_dict\(\) led to another batch"):
        assert read(resumed(source, kind()), 0, 2) == expected[2:]


def test_a_stream_that_gives_the_same_batches_in_no_way_is_refused_by_name() -> None:
    source = make(Unrepeatable())
    batches = source.epoch(0)
    next(batches)
    changed = Unrepeatable()
    changed.random.seed(4)
    with pytest.raises(DataError, match=r"Unrepeatable cannot be resumed within the epoch: .* derive the order"):
        read(resumed(source, changed), 0, 1)


def test_saving_changes_no_batch() -> None:
    expected, source = read(make(Shuffled()), 0), make(Shuffled())
    found = []
    for batch in source.epoch(0):
        assert source.state_dict() == source.state_dict()
        found.append(list(batch.data))
    assert found == expected


@pytest.mark.parametrize("fails_at", [4, 6, 8, 11])
def test_a_stream_that_failed_resumes_after_the_last_step(fails_at: int) -> None:
    expected, source = read(make(Shuffled()), 0), make(Shuffled(fails_at))
    delivered = 0

    def train() -> None:
        nonlocal delivered
        for batch in source.epoch(0):
            delivered = batch.end

    with pytest.raises(OSError, match="connection"):
        train()
    for steps in range(delivered + 1):  # a step may take several batches, of which only some were read
        assert read(resumed(source, Shuffled()), 0, steps) == expected[steps:]


def test_a_state_that_was_loaded_and_not_used_yet_can_be_saved() -> None:
    source = make(Shuffled())
    next(source.epoch(0))
    rest = resumed(source, Shuffled())
    assert rest.state_dict() == source.state_dict()


class Sized(IterableDataset[int]):
    def __init__(self, n: int, first_worker_takes_all: bool = False) -> None:
        self.n, self.first_worker_takes_all = n, first_worker_takes_all

    def __len__(self) -> int:
        return self.n

    @override
    def __iter__(self) -> Iterator[int]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        if self.first_worker_takes_all:
            return iter(range(0 if first else self.n))
        return iter(range(first, self.n, step))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("n", [9, 10, 12, 17])
def test_the_number_of_batches_of_a_stream_shared_by_workers_is_known(n: int, drop_last: bool) -> None:
    source = make(Sized(n), num_workers=2, drop_last=drop_last, timeout=30)
    assert source.num_batches() == len(read(source, 0))


def test_the_number_of_batches_is_corrected_after_an_epoch() -> None:
    source = make(Sized(10, first_worker_takes_all=True), num_workers=2, timeout=30)
    assert source.num_batches() == 4
    assert len(read(source, 0)) == source.num_batches() == 3


class Weights(IterableDataset[Tensor]):
    """Yields the weights of a model as they are."""

    def __init__(self, model: nn.Linear) -> None:
        self.model = model

    @override
    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield self.model.weight.detach().clone()


class WeightsLoop(TrainingLoop[Tensor, None, nn.Linear]):
    @override
    def train_step(self, batch: Tensor) -> StepOutput[None]:
        assert torch.equal(batch.flatten(), self.model.weight.flatten())
        return StepOutput(loss=self.model.weight.sum(), outputs=None)


@pytest.mark.parametrize("batch_size", [None, 1])
def test_a_stream_is_read_with_the_weights_of_the_step(batch_size: int | None) -> None:
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    loop = WeightsLoop(model, optimizer=SGD(model.parameters(), lr=0.1), default_callbacks=())
    loop.train(DataLoader(Weights(model), batch_size=batch_size), max_steps=5)
    torch.testing.assert_close(model.weight.detach(), before - 0.5)
