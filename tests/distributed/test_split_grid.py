"""A property: gradient, reported loss and learning rate are those of one process with the full batch.

The reference is plain PyTorch over the same order of samples, one backward pass for all items of a step.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import Dataset
from typing_extensions import override

from ptacc import GradAccumMixin, LRSchedulerMixin, SeedMixin, StepOutput, StepResult, TrainingLoop
from ptacc.testing import epoch_order
from tests.ranks import run_ranks

SEED, LENGTH = 11, 4
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
Pairs = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    batch_size: int
    accumulation: int
    samples: int
    unit: Literal["samples", "tokens"]
    dtype: torch.dtype = torch.float64


@dataclass
class GridResult:
    gradients: list[Tensor]
    losses: list[float]
    rates: list[float]


class Sentences(Dataset[Pairs]):
    """Sentences of 0 to 4 tokens that count; the targets of the others are -100."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __len__(self) -> int:
        return self.case.samples

    @override
    def __getitem__(self, index: int) -> Pairs:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randn(LENGTH, 3, generator=generator, dtype=torch.float64).to(self.case.dtype)
        targets = torch.randint(0, 2, (LENGTH,), generator=generator)
        if self.case.unit == "tokens":
            targets[(7 * index + 2) % (LENGTH + 1) :] = -100
        return tokens, targets


class Loop(SeedMixin, GradAccumMixin, LRSchedulerMixin, TrainingLoop[Pairs, Tensor]):
    unit: str = "samples"

    @override
    def count_items(self, batch: Pairs) -> int:
        return int((batch[1] != -100).sum()) if self.unit == "tokens" else len(batch[1])

    @override
    def train_step(self, batch: Pairs) -> StepOutput[Tensor]:
        loss = summed_loss(self.model, batch)
        if self.unit == "tokens":
            return StepOutput.from_sum(loss, outputs=loss)
        return StepOutput(loss=loss / len(batch[1]), outputs=loss)

    @override
    def on_gradients_ready(self, step: StepResult) -> None:
        super().on_gradients_ready(step)
        gradients.append(torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None]))


gradients: list[Tensor] = []


def summed_loss(model: nn.Module, batch: Pairs) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="sum")


def make_model(case: Case) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(case.dtype)


def train(cases: Sequence[Case]) -> list[GridResult]:
    return [train_one(case) for case in cases]


def train_one(case: Case) -> GridResult:
    gradients.clear()
    model = make_model(case)
    trainer = Loop(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        create_scheduler=lambda optimizer, plan: StepLR(optimizer, 1, gamma=0.9),
        gradient_accumulation_steps=case.accumulation,
        unit=case.unit,
        seed=SEED,
        default_callbacks=(),
    )
    history = trainer.train(Sentences(case), num_epochs=1, per_device_batch_size=case.batch_size)
    losses, rates = [s.loss for s in history.steps], [s.learning_rate for s in history.steps]
    return GridResult([gradient.clone() for gradient in gradients], losses, rates)


def reference(case: Case, world_size: int) -> GridResult | None:
    """Return the outcome of plain PyTorch; None if a step has no items."""
    model, data = make_model(case), Sentences(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = StepLR(optimizer, 1, gamma=0.9)
    outcome, size = GridResult([], [], []), case.batch_size * case.accumulation * world_size
    order = epoch_order(SEED, 0, case.samples)
    for start in range(0, len(order), size):
        samples = [data[index] for index in order[start : start + size]]
        batch = (torch.stack([tokens for tokens, _ in samples]), torch.stack([targets for _, targets in samples]))
        items = int((batch[1] != -100).sum()) if case.unit == "tokens" else len(samples)
        if not items:
            return None
        loss = summed_loss(model, batch) / items
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        outcome.gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        outcome.losses.append(loss.item())
        outcome.rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return outcome


def check(cases: Sequence[Case], world_size: int) -> int:
    """Compare all cases that have items in every step, on one set of processes, and return their number."""
    wanted = [(case, expected) for case in cases if (expected := reference(case, world_size)) is not None]
    chosen = [case for case, _ in wanted]
    ranks = [train(chosen)] if world_size == 1 else run_ranks(train, world_size, chosen, timeout=600)
    for results in ranks:
        for (case, expected), got in zip(wanted, results, strict=True):
            assert_close(got, expected, case)
    return len(wanted)


def assert_close(got: GridResult, expected: GridResult, case: Case) -> None:
    tolerance = TOLERANCE[case.dtype]
    assert got.rates == expected.rates, case
    assert got.losses == pytest.approx(expected.losses, rel=tolerance, abs=0), case
    for ours, plain in zip(got.gradients, expected.gradients, strict=True):
        assert float((ours - plain).norm()) <= tolerance * float(plain.norm()), case


CASES: st.SearchStrategy[list[Case]] = st.lists(
    st.builds(
        Case,
        batch_size=st.integers(1, 5),
        accumulation=st.integers(1, 4),
        samples=st.integers(1, 40),
        unit=st.sampled_from(["samples", "tokens"]),
        dtype=st.sampled_from([torch.float64, torch.float32]),
    ),
    min_size=8,
    max_size=8,
)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@settings(max_examples=4)
@given(cases=CASES)
def test_splitting_a_step_changes_nothing(world_size: int, cases: list[Case]) -> None:
    check(cases, world_size)


@pytest.mark.prove
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("unit", ["samples", "tokens"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_full_grid(dtype: torch.dtype, unit: Any, world_size: int) -> None:
    sizes = [1, 2, 3, 5, 7, 8, 11, 16, 23, 29, 32, 37]
    grid = [Case(b, a, n, unit, dtype) for b, a, n in itertools.product((1, 2, 3, 5), (1, 2, 3, 4), sizes)]
    assert check(grid, world_size) > len(grid) // 2
