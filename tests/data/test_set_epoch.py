"""`set_epoch` is called once an epoch, wherever a dataset or sampler that has it sits, and in every process."""

import random
import signal
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, ChainDataset, ConcatDataset, DataLoader, Dataset, IterableDataset, Subset
from torchdata.stateful_dataloader import StatefulDataLoader
from typing_extensions import override

from ptacc import CheckpointMixin, Epochs, SeedMixin, StepOutput, Steps, Trainer
from ptacc.data.loading import set_epoch
from ptacc.data.sources import make_source
from ptacc.distributed.process_group import DistributedRuntime

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata's own
Sample = tuple[Tensor, Tensor]


class Epochwise(Dataset[Sample]):
    """Samples that hold the last epoch, and how many times it was set in the process that loads them."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def __len__(self) -> int:
        return 4

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    @override
    def __getitem__(self, index: int) -> Sample:
        return torch.tensor([float(index), self.epochs[-1], len(self.epochs)]), torch.zeros(1)


class EpochwiseStream(IterableDataset[Sample]):
    def __init__(self) -> None:
        self.source = Epochwise()
        self.set_epoch = self.source.set_epoch

    @override
    def __iter__(self) -> Iterator[Sample]:
        return (self.source[index] for index in range(4))


class Order:
    """A sampler."""

    def __init__(self, source: Sized) -> None:
        self.source, self.epochs = source, list[int]()

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.source)))

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


def holders(data: Epochwise) -> dict[str, Dataset[Any]]:
    return {
        "bare": data,
        "a subset": Subset(Subset(data, range(4)), range(4)),
        "a concatenation": ConcatDataset([Subset(data, range(2)), Subset(data, range(2, 4))]),
    }


LOADERS: dict[str, Callable[..., DataLoader[Any]]] = {
    "torch's": DataLoader,
    "stateful": StatefulDataLoader,
}


def epochs_seen(loader: DataLoader[Any]) -> list[list[list[float]]]:
    """Return [epoch, times set] of the samples of two epochs."""
    source = make_source(loader, DistributedRuntime(), 7)
    return [[row[1:] for batch in source.epoch(epoch) for row in batch.data[0].tolist()] for epoch in (0, 1)]


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("holder", holders(Epochwise()))
def test_a_dataset_is_told_the_epoch_once_wherever_it_is_held(holder: str, kind: str) -> None:
    loader = LOADERS[kind](holders(Epochwise())[holder], batch_size=2)
    assert epochs_seen(loader) == [[[0, 1]] * 4, [[1, 2]] * 4]


def test_all_datasets_of_a_concatenation_are_told_the_epoch() -> None:
    first, second = Epochwise(), Epochwise()
    assert set_epoch(ConcatDataset([first, Subset(second, range(2)), Subset(second, range(2, 4))]), 3, seed=7)
    assert first.epochs == second.epochs == [3]


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("is_persistent", [False, True])
def test_so_are_the_copies_in_workers(kind: str, is_persistent: bool) -> None:
    options: Any = {"num_workers": 2, "persistent_workers": is_persistent, "timeout": 30}
    loader = LOADERS[kind](Subset(Epochwise(), range(4)), batch_size=2, **options)
    assert epochs_seen(loader) == [[[0, 1]] * 4, [[1, 2]] * 4]


@pytest.mark.parametrize("kind", LOADERS)
def test_a_stream_within_another_is_told_the_epoch(kind: str) -> None:
    loader = LOADERS[kind](ChainDataset([EpochwiseStream()]), batch_size=2)
    assert epochs_seen(loader) == [[[0, 1]] * 4, [[1, 2]] * 4]


@pytest.mark.parametrize("kind", LOADERS)
def test_a_dataset_that_is_held_by_another_name_is_told_the_epoch(kind: str) -> None:
    class Renamed(Dataset[Sample]):
        def __init__(self, rows: Dataset[Sample]) -> None:
            self.rows = rows

        def __len__(self) -> int:
            return 4

        @override
        def __getitem__(self, index: int) -> Sample:
            return self.rows[index]

    data = Epochwise()
    epochs_seen(LOADERS[kind](Renamed(data), batch_size=2))
    assert data.epochs == [0, 1]


@pytest.mark.parametrize("kind", LOADERS)
def test_samplers_are_told_the_epoch_once(kind: str) -> None:
    data = [(torch.ones(3), torch.ones(1))] * 4
    alone, within = Order(data), Order(data)
    loaders = [
        LOADERS[kind](data, batch_size=2, sampler=alone),
        LOADERS[kind](data, batch_sampler=BatchSampler(within, 2, drop_last=False)),
    ]
    for loader in loaders:
        epochs_seen(loader)
    assert alone.epochs == within.epochs == [0, 1]


def test_an_object_that_sets_the_epoch_of_what_it_holds_is_not_passed_over() -> None:
    class Forwarding(Subset[Sample]):
        def set_epoch(self, epoch: int) -> None:
            set_epoch(self.dataset, epoch, 7)

    data = Epochwise()
    assert set_epoch(Forwarding(data, range(4)), 3, seed=7)
    assert data.epochs == [3]
    assert not set_epoch([data], 4, seed=7)  # a list of samples


def test_an_evaluation_on_another_part_of_the_data_does_not_set_the_epoch() -> None:
    net, data = nn.Linear(3, 1), Epochwise()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    trainer = Trainer(net, loss_func=nn.MSELoss(), optimizer=optimizer, default_callbacks=())
    parts = Subset(data, range(2)), Subset(data, range(2, 4))
    for cadence in (Steps(1), Epochs(1)):
        trainer.train(*parts, num_epochs=2, per_device_batch_size=1, evaluate_every=cadence)
    assert data.epochs == [0, 1, 0, 1]


def test_an_evaluation_does_not_set_the_epoch_of_the_stream_that_it_shares_with_the_training() -> None:
    class Seeing(Trainer):
        @override
        def train_step(self, batch: Any) -> StepOutput[Tensor]:
            seen.append(batch[0][:, :2].tolist())
            return super().train_step(batch)

    def train(**evaluation: Any) -> list[Any]:
        seen.clear()
        net, data = nn.Linear(3, 1), EpochwiseStream()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        trainer = Seeing(net, loss_func=nn.MSELoss(), optimizer=optimizer, default_callbacks=())
        trainer.train(data, data if evaluation else None, max_steps=8, per_device_batch_size=2, **evaluation)
        trainer.evaluate(data)
        assert data.source.epochs == [0, 1, 2, 3]
        return [*seen]

    seen: list[Any] = []
    assert train(evaluate_every=Steps(1)) == train()


class Drawn(Dataset[Sample]):
    """Draws its order when the epoch is set."""

    def __init__(self) -> None:
        self.order = list(range(16))

    def __len__(self) -> int:
        return 16

    def set_epoch(self, epoch: int) -> None:
        self.order = [int(10 * random.random() + np.random.rand()), *torch.randperm(16).tolist()[1:]]  # noqa: NPY002

    @override
    def __getitem__(self, index: int) -> Sample:
        return torch.tensor([float(self.order[index])]), torch.zeros(1)

    def __iter__(self) -> Iterator[int]:
        return iter([0, *self.order[1:]])


class DrawnStream(IterableDataset[Sample]):
    def __init__(self) -> None:
        self.source = Drawn()

    @override
    def __iter__(self) -> Iterator[Sample]:
        return (self.source[index] for index in range(16))


WORKERS: Any = {"num_workers": 2, "persistent_workers": True, "timeout": 30}
DRAWN: dict[str, Callable[[], DataLoader[Any]]] = {
    "a dataset": lambda: DataLoader(Drawn(), batch_size=2),
    "a dataset in workers": lambda: DataLoader(Drawn(), batch_size=2, **WORKERS),
    "a loader of its own type": lambda: StatefulDataLoader(Drawn(), batch_size=2),
    "a stream": lambda: DataLoader(DrawnStream(), batch_size=2),
    "a sampler": lambda: DataLoader(EpochwiseRange(), batch_size=2, sampler=Drawn()),
}


class EpochwiseRange(Epochwise):
    @override
    def __len__(self) -> int:
        return 16


@pytest.mark.parametrize("kind", DRAWN)
def test_what_set_epoch_draws_follows_from_the_seed_and_the_epoch(kind: str) -> None:
    def read(seed: int, *epochs: int) -> list[list[float]]:
        torch.rand(3 + len(epochs))  # the generators of two processes, or of a run that is resumed, differ
        before = torch.get_rng_state()
        source = make_source(DRAWN[kind](), DistributedRuntime(), seed)
        found = [[x for batch in source.epoch(epoch) for x in batch.data[0][:, 0].tolist()] for epoch in epochs]
        source.close()
        assert torch.equal(torch.get_rng_state(), before)
        return found

    first, second = read(7, 0, 1)
    assert read(7, 1) == [second] != [first]
    assert read(8, 1) != [second]


class Interrupted(CheckpointMixin, SeedMixin, Trainer):
    """Gets SIGTERM in the evaluation after a step."""

    ends_at: int = 0

    @override
    def on_eval_batch_end(self, batch: Any, output: StepOutput[Tensor]) -> None:
        super().on_eval_batch_end(batch, output)
        if self.progress.steps == self.ends_at:
            signal.raise_signal(signal.SIGTERM)


SHARED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "a dataset": (Drawn, {}),
    "a stream": (DrawnStream, {}),
    "a stream in workers": (DrawnStream, {"train_dataloader_kwargs": WORKERS | {"num_workers": 1}}),
    "a loader of its own type": (lambda: StatefulDataLoader(Drawn(), batch_size=4), {}),
}


@pytest.mark.parametrize("kind", SHARED)
def test_an_interrupted_evaluation_is_made_again_in_the_same_epoch(kind: str, tmp_path: Path) -> None:
    make, options = SHARED[kind]

    def train(directory: Path, ends_at: int = 0) -> list[float]:
        net, data = nn.Linear(1, 1, bias=False), make()
        nn.init.ones_(net.weight)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        trainer = Interrupted(
            net,
            loss_func=lambda outputs, targets: (outputs * torch.arange(1.0, len(outputs) + 1)[:, None]).mean(),
            optimizer=optimizer,
            seed=3,
            checkpoint_dir=directory,
            resume=True,
            default_callbacks=(),
            ends_at=ends_at,
        )
        size: Any = {} if isinstance(data, DataLoader) else {"per_device_batch_size": 4}
        history = trainer.train(data, data, num_epochs=2, max_steps=99, evaluate_every=Epochs(1), **size, **options)
        return [record.eval_loss for record in history if record.eval_loss is not None]

    whole = train(tmp_path / "whole")
    for step in (4, 8):
        with pytest.raises(SystemExit):
            train(tmp_path / "legs", step)
    assert train(tmp_path / "legs") == whole
