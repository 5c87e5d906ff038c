"""Evaluation and prediction see every sample once: any size of data, batch and launch, map-style or a stream."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from ptacc import MetricsMixin, Trainer
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import run_ranks


@dataclass(frozen=True)
class Case:
    samples: int
    batch_size: int
    kind: Literal["map", "stream"]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    @override
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(*self.data.tensors, strict=True)


class Measured(MetricsMixin, Trainer): ...


def make_model() -> nn.Module:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    model(torch.randn(16, 4, dtype=torch.float64))  # statistics that differ from a fresh layer's
    return model


def evaluate_and_predict(cases: Sequence[Case]) -> list[tuple[float, float, list[float]]]:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metric = MulticlassAccuracy(2, average="micro").double()
    parts: dict[str, Any] = {**tiny_parts(), "model": model, "optimizer": optimizer}
    trainer = Measured(**parts, metrics={"accuracy": metric})
    found = []
    for case in cases:
        data = tiny_data(case.samples) if case.kind == "map" else Stream(tiny_data(case.samples))
        result = trainer.evaluate(data, per_device_batch_size=case.batch_size)
        predictions = trainer.predict(data, per_device_batch_size=case.batch_size)
        found.append((result.loss, result.metrics["accuracy"], [float(output[0]) for output in predictions]))
    return found


def reference(case: Case) -> tuple[float, float, list[float]]:
    inputs, targets = tiny_data(case.samples).tensors
    with torch.no_grad():
        outputs = make_model().eval()(inputs)
    accuracy = (outputs.argmax(dim=1) == targets).double().mean()
    return float(nn.functional.cross_entropy(outputs, targets)), float(accuracy), outputs[:, 0].tolist()


def check(cases: Sequence[Case], world_size: int) -> None:
    ranks = (
        [evaluate_and_predict(cases)]
        if world_size == 1
        else run_ranks(evaluate_and_predict, world_size, cases, timeout=900)
    )
    for found in ranks:
        for case, got in zip(cases, found, strict=True):
            loss, accuracy, outputs = reference(case)
            assert got[0] == pytest.approx(loss, rel=1e-12), case
            assert got[1] == pytest.approx(accuracy, rel=1e-6), case  # torchmetrics divides in float32
            assert got[2] == pytest.approx(outputs, rel=1e-12), case


CASES = st.lists(
    st.builds(
        Case, samples=st.integers(1, 64), batch_size=st.sampled_from([1, 3, 8]), kind=st.sampled_from(["map", "stream"])
    ),
    min_size=6,
    max_size=6,
)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@settings(max_examples=2)
@given(cases=CASES)
def test_every_sample_counts_once(world_size: int, cases: list[Case]) -> None:
    check(cases, world_size)


@pytest.mark.prove
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["map", "stream"])
def test_the_full_grid(kind: Literal["map", "stream"], world_size: int) -> None:
    check([Case(n, batch_size, kind) for n, batch_size in itertools.product(range(1, 65), (1, 3, 8))], world_size)
