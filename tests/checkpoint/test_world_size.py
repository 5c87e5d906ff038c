"""A run that resumes with another number of processes trains on each sample that is left of the epoch once."""

from collections.abc import Collection
from dataclasses import field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from ptacc import (
    CheckpointMixin,
    EMAMixin,
    MetricsMixin,
    SeedMixin,
    StepOutput,
    Trainer,
)
from ptacc.testing import epoch_order
from tests.checkpoint.runs import StopAt
from tests.ranks import RankFailed, run_ranks

SAMPLES, SEED = 50, 5
NUMBERS = torch.arange(SAMPLES, dtype=torch.float64)
DATA = TensorDataset(torch.stack([NUMBERS, NUMBERS.sin(), NUMBERS.cos()], dim=1), (NUMBERS % 3 == 0).long())


Plan = list[tuple[int, int, int | None]]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    @override
    def __iter__(self) -> Any:
        return iter([DATA[i] for i in range(SAMPLES)])


class CustomLoader(DataLoader[Any]):
    """A loader whose batches are taken as they are, since it is of another type."""


class Elastic(CheckpointMixin, EMAMixin, MetricsMixin, SeedMixin, Trainer):
    seed: int | None = SEED
    ema_decay: float = 0.5
    seen: list[list[int]] = field(init=False, metadata={"saved": False}, default_factory=list)

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        host = self.run.batch
        assert host is not None
        self.seen.append([] if host.is_padding else batch[0][:, 0].int().tolist())
        return super().train_step((batch[0][:, 1:], batch[1]))


def leg(
    directory: Path,
    batch_size: int,
    until: int | None,
    despite: Collection[str] = (),
    data: Dataset[Any] = DATA,
    metrics: bool = False,
    kind: type[DataLoader[Any]] = DataLoader,
) -> tuple[list[list[int]], list[float], list[float]]:
    """Go on with the run up to a step, and return each batch of this process, the epochs' losses, and the weights."""
    torch.manual_seed(0)
    model = nn.Linear(2, 2).double()
    trainer = Elastic(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=torch.optim.Adam(model.parameters(), lr=0.05),
        default_callbacks=(),
        callbacks=[StopAt(until)],
        checkpoint_dir=directory,
        checkpoint_every=None,
        resume=True,
        resume_ignore={*despite, "stop"},
        train_metrics={"accuracy": MulticlassAccuracy(2)} if metrics else {},
    )
    loader = kind(data, batch_size=batch_size, shuffle=data is DATA)
    history = trainer.train(loader, num_epochs=2, stop_check_every=1, max_steps=100)
    return trainer.seen, [epoch.train_loss for epoch in history], model.weight.flatten().tolist()


def legs(directory: Path, plan: Plan, **options: Any) -> tuple[list[int], Any]:
    """Run legs of (processes, batch size, last step), and return all samples in order, and what the last one found."""
    samples: list[int] = []
    found: Any = None
    for world_size, batch_size, until in plan:
        found = run_ranks(lambda *choose_leg: leg(*choose_leg, **options), world_size, directory, batch_size, until)
        for batches in zip(*(rank[0] for rank in found), strict=True):
            samples += [number for batch in batches for number in batch]
    return samples, found[0][1:]


ORDER = epoch_order(SEED, 0, SAMPLES) + epoch_order(SEED, 1, SAMPLES)
pytestmark = pytest.mark.filterwarnings("ignore:The run resumes with")


def test_the_numbers_are_those_of_one_process(tmp_path: Path) -> None:
    plan: Plan = [(1, 8, 2), (2, 4, 4), (4, 2, 9), (2, 4, 11), (1, 8, None)]
    samples, (losses, weights) = legs(tmp_path / "legs", plan)
    (_, expected_losses, expected_weights), *_ = run_ranks(leg, 1, tmp_path / "whole", 8, None)
    assert samples == ORDER
    assert losses == pytest.approx(expected_losses, rel=1e-12)
    assert weights == pytest.approx(expected_weights, rel=1e-12)


def test_no_sample_is_lost_and_none_repeated_when_batches_grow_and_shrink(tmp_path: Path) -> None:
    plan: Plan = [(1, 4, 3), (2, 4, 5), (4, 4, 7), (2, 4, 9), (1, 4, None)]
    samples, _ = legs(tmp_path, plan, despite={"batch_size"})
    assert samples == ORDER


@pytest.mark.parametrize("world_size", [1, 4])
def test_other_batches_are_refused_by_name(tmp_path: Path, world_size: int) -> None:
    legs(tmp_path, [(2, 4, 2)])
    with pytest.raises(RankFailed, match=r"batch_size was 'global batches of 8' and is 'global batches of \d+'"):
        legs(tmp_path, [(world_size, 4, None)])


def test_a_stream_resumes_in_the_same_batches_only(tmp_path: Path) -> None:
    samples, _ = legs(tmp_path / "same", [(1, 8, 2), (2, 4, 9), (1, 8, None)], data=Stream())
    assert samples == list(range(SAMPLES)) * 2
    legs(tmp_path / "other", [(1, 8, 2)], data=Stream())
    with pytest.raises(RankFailed, match="the remaining samples are unknown"):
        legs(tmp_path / "other", [(2, 8, None)], data=Stream(), despite={"batch_size"})


def test_the_batches_of_a_custom_loader_resume_in_any_number_of_processes(tmp_path: Path) -> None:
    plan: Plan = [(1, 8, 2), (2, 8, 4), (1, 8, None)]
    samples, _ = legs(tmp_path, plan, despite={"batch_size"}, kind=CustomLoader)
    assert [sorted(samples[:SAMPLES]), sorted(samples[SAMPLES:])] == [[*range(SAMPLES)]] * 2


def test_metrics_under_way_are_refused_by_name(tmp_path: Path) -> None:
    legs(tmp_path, [(1, 8, 2)], metrics=True)
    with pytest.raises(RankFailed, match=r"(?s)no part .train_metrics. for.*resume_ignore=\{.train_metrics.\}"):
        legs(tmp_path, [(2, 4, None)], metrics=True)
    samples, _ = legs(tmp_path, [(2, 4, None)], metrics=True, despite={"train_metrics"})
    assert sorted(samples) == sorted(ORDER[16:])
