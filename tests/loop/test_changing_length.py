"""Epochs are passes over what the data has at that time: datasets that grow, and batch samplers of varying length."""

import os
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from ptacc import (
    CheckpointMixin,
    GradAccumMixin,
    SeedMixin,
    StepOutput,
    TrainingLoop,
)
from ptacc.errors import DataError
from tests.checkpoint.runs import make_leg
from tests.ranks import run_ranks

SIZES = [16, 48, 32]
LENGTHS = [6, 8, 7]
REVISED = "the run now has .* steps, and was planned with"
pytestmark = pytest.mark.filterwarnings(f"ignore:.*{REVISED}:UserWarning")


class Growing(Dataset[Tensor]):
    """Has another number of samples in each epoch."""

    def __init__(self) -> None:
        self.size = SIZES[0]

    def set_epoch(self, epoch: int) -> None:
        self.size = SIZES[epoch]

    def __len__(self) -> int:
        return self.size

    @override
    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index / 48])


class Varying:
    """A batch sampler that gives another number of batches in each epoch than it promises."""

    def __init__(self) -> None:
        self.epoch = 0

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[list[int]]:
        self.epoch += 1
        return iter([[3 * number, 3 * number + 1] for number in range(LENGTHS[self.epoch - 1])])


def growing() -> DataLoader[Any]:
    return DataLoader(Growing(), batch_size=4, shuffle=True)


def varying() -> DataLoader[Any]:
    return DataLoader([torch.tensor([index / 48]) for index in range(48)], batch_sampler=Varying())  # type: ignore[arg-type]


class Recording(CheckpointMixin, GradAccumMixin, SeedMixin, TrainingLoop[Tensor, Tensor]):
    seed: int | None = 3
    totals: list[int] = field(init=False, default_factory=list, metadata={"saved": False})

    @override
    def train_step(self, batch: Tensor) -> StepOutput[Tensor]:
        self.totals.append(self.run.plan.total_steps)
        return StepOutput(loss=(self.model(batch) - 1).square().mean(), outputs=batch)


def leg(
    directory: Path, loader: DataLoader[Any], until: int | None = None, accumulation: int = 1, **limits: Any
) -> Any:
    """Resume a run up to a step. Return its last loss and weight, the last step of each epoch, and all plans."""
    torch.manual_seed(0)
    net = nn.Linear(1, 1)
    trainer = make_leg(Recording, net, directory, until, gradient_accumulation_steps=accumulation)
    settings: Any = {"num_epochs": 3, "stop_check_every": 1, **limits}
    history = trainer.train(loader, **settings)
    ends = [record.step for record in history]
    return history[-1].train_loss, net.weight.item(), ends, trainer.totals


@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_epoch_is_a_pass_over_what_is_there(tmp_path: Path, accumulation: int) -> None:
    *_, grown, planned = leg(tmp_path / "grown", growing(), accumulation=accumulation)
    *_, varied, revised = leg(tmp_path / "varied", varying(), accumulation=accumulation)
    assert grown == ([4, 16, 24] if accumulation == 1 else [2, 8, 12])
    assert varied == ([6, 14, 21] if accumulation == 1 else [3, 7, 11])
    assert planned[-1] == grown[-1]
    assert revised[-1] == varied[-1]


def test_weights_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    net = nn.Linear(1, 1)
    torch.manual_seed(0)
    net.reset_parameters()
    optimizer, loader = torch.optim.SGD(net.parameters(), lr=0.1), varying()
    for _ in range(3):
        for batch in loader:
            optimizer.zero_grad()
            (net(batch) - 1).square().mean().backward()
            optimizer.step()
    assert leg(tmp_path, varying())[1] == net.weight.item()


@pytest.mark.parametrize("make", [growing, varying])
@pytest.mark.parametrize("stops", [[3, 5, 14, None], [6, 11, 16, 19, None], [4, 13, 20, None]])
def test_such_a_run_resumes_exactly(tmp_path: Path, make: Any, stops: list[int | None]) -> None:
    loss, weight, ends, totals = leg(tmp_path / "whole", make())
    legs = [leg(tmp_path / "legs", make(), until) for until in stops]
    assert legs[-1][:2] == (loss, weight)
    assert legs[-1][2][-1] == ends[-1]
    assert [total for found in legs for total in found[3]] == totals


@pytest.mark.parametrize("make", [growing, varying])
def test_such_a_run_resumes_exactly_on_two_processes(tmp_path: Path, make: Any) -> None:
    def worker(directory: Path, stops: list[int | None]) -> Any:
        assert os.environ["WORLD_SIZE"] == "2"
        return [leg(directory, make(), until) for until in stops][-1][:2]

    runs: list[list[int | None]] = [[None], [2, 5, None]]
    whole, legs = (run_ranks(worker, 2, tmp_path / f"{len(stops)}", stops) for stops in runs)
    assert legs == whole
    assert whole[0] == whole[1]


def test_each_epoch_of_data_that_is_sharded_is_as_long_as_its_longest_part(tmp_path: Path) -> None:
    def worker(directory: Path) -> Any:
        loader: DataLoader[Any] = growing() if os.environ["RANK"] == "0" else DataLoader([torch.ones(1)] * 6)  # type: ignore[arg-type]
        *_, ends, totals = leg(directory, loader, data_is_sharded=True)
        return ends, totals[-1]

    assert run_ranks(worker, 2, tmp_path) == [([6, 18, 26], 26)] * 2


def test_a_change_of_the_plan_is_reported_with_both_numbers(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"Epoch 2 has 12 batches .* run now has 28 steps, and was planned with 12\."):
        leg(tmp_path, growing())


def test_a_run_limited_by_steps_keeps_its_plan(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    *_, ends, totals = leg(tmp_path, growing(), num_epochs=None, max_steps=10)
    assert ends == [4, 10]
    assert set(totals) == {10}
    assert not [warning for warning in recwarn if "planned" in str(warning.message)]


def test_an_epoch_is_not_resumed_in_data_of_another_length(tmp_path: Path) -> None:
    class Reset(Growing):
        @override
        def set_epoch(self, epoch: int) -> None: ...

    leg(tmp_path, growing(), 7)
    with pytest.raises(DataError, match="within an epoch of 48 samples, and the data now has 16 samples"):
        leg(tmp_path, DataLoader(Reset(), batch_size=4, shuffle=True))


def test_a_loader_without_end_needs_a_limit(tmp_path: Path) -> None:
    class Endless(DataLoader[Any]):
        @override
        def __iter__(self) -> Any:
            while True:
                yield torch.ones(2, 1)

    loader = Endless([torch.ones(1)] * 4, batch_size=2)  # type: ignore[arg-type]
    assert leg(tmp_path / "limited", loader, max_steps=30)[2] == [30]
    with pytest.raises(DataError, match="promised 2 batches, and has given 21 without an end"):
        leg(tmp_path / "unlimited", loader)
