"""A resumed run trains on the samples that are left, whatever its data is, and however often it was interrupted."""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
)
from typing_extensions import override

from ptacc import CheckpointMixin, LRSchedulerMixin, SeedMixin, StepOutput, Trainer
from ptacc.engines.base import Engine
from ptacc.engines.default import TorchEngine
from ptacc.protocols import SchedulerFactory
from tests.checkpoint.resumed import Augmented
from tests.checkpoint.runs import StopAt
from tests.ranks import run_ranks

Sample = tuple[Tensor, Tensor]


class Stream(IterableDataset[Sample]):
    """Samples in an order that is drawn in each epoch."""

    @override
    def __iter__(self) -> Iterator[Sample]:
        source = Augmented()
        yield from (source[index] for index in random.sample(range(len(source)), len(source)))


class Placed(IterableDataset[Sample]):
    """Says where it is."""

    def __init__(self) -> None:
        self.place = 0

    @override
    def __iter__(self) -> Iterator[Sample]:
        source = Augmented()
        while self.place < len(source):
            self.place += 1
            yield source[self.place - 1]
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.place = state_dict["place"]


class OwnLoader(DataLoader[Any]): ...


def drawn() -> torch.Generator:
    return torch.Generator().manual_seed(3)


KINDS: dict[str, Callable[[], DataLoader[Any]]] = {
    "shuffled": lambda: DataLoader(Augmented(), batch_size=4, shuffle=True),
    "in order": lambda: DataLoader(Augmented(), batch_size=4, drop_last=True),
    "two workers that persist": lambda: DataLoader(
        Augmented(), batch_size=4, shuffle=True, num_workers=2, persistent_workers=True, timeout=30
    ),
    "drawn with replacement": lambda: DataLoader(
        Augmented(), batch_size=4, sampler=WeightedRandomSampler([1.0] * 18, 14, generator=drawn())
    ),
    "in batches of its own": lambda: DataLoader(
        Augmented(), batch_sampler=BatchSampler(RandomSampler(range(18), generator=drawn()), 4, drop_last=False)
    ),
    "a loader of its own": lambda: OwnLoader(Augmented(), batch_size=4, shuffle=True, generator=drawn()),
    "a stream": lambda: DataLoader(Stream(), batch_size=4),
    "a stream by a worker": lambda: DataLoader(Stream(), batch_size=4, num_workers=1, timeout=30),
    "a stream that says where it is": lambda: DataLoader(Placed(), batch_size=4),
    "sharded already": lambda: DataLoader(Augmented(), batch_size=4, sampler=DistributedSampler(Augmented(), 2, 0)),
}


class Plain(CheckpointMixin, SeedMixin, Trainer):
    seed: int | None = 5
    seen: list[Any] = field(init=False, metadata={"saved": False}, default_factory=list)

    @override
    def train_step(self, batch: Sample) -> StepOutput[Tensor]:
        self.seen.append(batch[0].tolist())
        weight = next(self.unwrapped_model.parameters())
        return super().train_step((batch[0].to(weight.dtype), batch[1]))

    @override
    def eval_step(self, batch: Sample) -> StepOutput[Tensor]:
        weight = next(self.unwrapped_model.parameters())
        return super().eval_step((batch[0].to(weight.dtype), batch[1]))


def leg(
    directory: Path,
    until: int | None,
    loader: DataLoader[Any],
    kind: type[Plain] = Plain,
    data_is_sharded: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[list[Any], list[float], float]:
    """Go on with a run up to a step; return its batches, its weights, and the last learning rate."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.4), nn.Linear(4, 2)).to(dtype)
    trainer = kind(
        net,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=torch.optim.Adam(net.parameters(), lr=0.05),
        default_callbacks=(),
        callbacks=[StopAt(until)],
        checkpoint_dir=directory,
        checkpoint_every=None,
        resume=True,
        resume_ignore={"stop"},
    )
    history = trainer.train(
        loader, Augmented(5), num_epochs=3, max_steps=13, stop_check_every=1, data_is_sharded=data_is_sharded
    )
    weights = [number for tensor in net.state_dict().values() for number in tensor.flatten().tolist()]
    return trainer.seen, weights, history[-1].learning_rate


def interrupted(directory: Path, stops: list[int | None], make: Callable[[], Any], *of_leg: Any) -> Any:
    found = [leg(directory, until, make(), *of_leg) for until in stops]
    return [batch for seen, *_ in found for batch in seen], *found[-1][1:]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("stops", [[3, 6, 7, None], [4, 5, 11, None]])
def test_a_run_that_is_interrupted_again_and_again_ends_as_one_that_was_not(
    tmp_path: Path, stops: list[int | None], kind: str
) -> None:
    whole = leg(tmp_path / "whole", None, KINDS[kind]())
    assert interrupted(tmp_path / "legs", stops, KINDS[kind]) == whole


@pytest.mark.parametrize("kind", ["shuffled", "a loader of its own", "a stream", "sharded already"])
def test_so_does_a_run_of_two_processes(tmp_path: Path, kind: str) -> None:
    def loader(rank: int) -> DataLoader[Any]:
        if kind == "sharded already":  # with one sample more on rank 0, which the other needs a phantom for
            return DataLoader(Augmented(), batch_size=4, sampler=list(range(rank, 17 - rank * 8)))
        return KINDS[kind]()

    def worker(directory: Path, stops: list[int | None]) -> Any:
        rank = int(os.environ["RANK"])
        data_is_sharded = kind == "sharded already"
        return interrupted(directory, stops, lambda: loader(rank), Plain, data_is_sharded)

    stops: list[list[int | None]] = [[None], [2, 5, None]]
    whole, legs = (run_ranks(worker, 2, tmp_path / f"{len(until)}", until) for until in stops)
    assert legs == whole


class RarelyDrawing(Dataset[Sample]):
    """Draws from all three generators for 5 of 400 samples, and from one of them for others."""

    def __len__(self) -> int:
        return 400

    @override
    def __getitem__(self, index: int) -> Sample:
        values = torch.full((6,), index / 400, dtype=torch.float64)
        if index % 80 == 3:
            values += random.random() + np.random.rand() + float(torch.rand(()))  # noqa: NPY002
        if index % 50 == 7:
            values += random.gauss()
        return values, torch.tensor(index % 2)


@pytest.mark.parametrize("stop", [5, 33, 63, 64, 65, 99, 101, 140])
def test_a_dataset_that_rarely_draws_resumes_exactly(tmp_path: Path, stop: int) -> None:
    def train(directory: Path, until: int | None) -> list[float]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.4), nn.Linear(4, 2)).double()
        options: dict[str, Any] = {"checkpoint_dir": directory, "checkpoint_every": None, "default_callbacks": ()}
        optimizer, stopping = torch.optim.SGD(net.parameters(), lr=0.1), StopAt(until)
        trainer = Plain(
            net,
            loss_func=nn.CrossEntropyLoss(),
            optimizer=optimizer,
            callbacks=[stopping],
            resume=True,
            resume_ignore={"stop"},
            **options,
        )
        trainer.train(RarelyDrawing(), num_epochs=2, per_device_batch_size=4, max_steps=170, stop_check_every=1)
        return [number for tensor in net.state_dict().values() for number in tensor.flatten().tolist()]

    train(tmp_path / "legs", stop)
    assert train(tmp_path / "legs", None) == train(tmp_path / "whole", None)


class Scaled(Plain):
    """With a gradient scaler whose factor is too large at first: steps are skipped."""

    @override
    def make_engine(self) -> Engine:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=2)
        return TorchEngine(self.accelerator, self.unwrapped_model, self.optimizer_slots(), scaler)


class Plateau(LRSchedulerMixin, Plain):
    create_scheduler: SchedulerFactory = lambda optimizer, plan: ReduceLROnPlateau(optimizer, patience=0, threshold=9.0)


@pytest.mark.parametrize("kind", [Scaled, Plateau])
def test_a_scaler_and_a_schedule_that_follows_a_value_resume(tmp_path: Path, kind: type[Plain]) -> None:
    whole = leg(tmp_path / "whole", None, KINDS["shuffled"](), kind, False, torch.float32)
    of_leg = (kind, False, torch.float32)
    assert interrupted(tmp_path / "legs", [1, 2, 6, 10, None], KINDS["shuffled"], *of_leg) == whole
    assert len(whole[0]) > 13 or kind is Plateau  # steps were skipped
