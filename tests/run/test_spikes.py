"""The running mean and deviation of gradient norms."""

import math

import pytest
import torch

from ptacc.run.spikes import WARMUP_STEPS, RunningDeviation


def follow(values: list[float], norms: RunningDeviation | None = None) -> RunningDeviation:
    norms = norms or RunningDeviation(torch.device("cpu"))
    for value in values:
        norms.add(torch.tensor(value, dtype=torch.float64), norms.limit(3.0))
    return norms


def test_the_first_norms_have_equal_weights() -> None:
    values = torch.rand(WARMUP_STEPS, dtype=torch.float64)
    expected = values.mean() + 3 * values.std(correction=0)
    assert float(follow(values.tolist()).limit(3.0)) == pytest.approx(float(expected))


def test_there_is_no_limit_at_first() -> None:
    assert float(follow([1.0] * (WARMUP_STEPS - 1)).limit(3.0)) == math.inf


def test_nan_and_infinity_do_not_count() -> None:
    values = torch.rand(2 * WARMUP_STEPS).tolist()
    assert follow([math.inf, *values[:30], math.nan, *values[30:]]).state_dict() == follow(values).state_dict()


def test_a_spike_counts_as_the_limit() -> None:
    values = torch.rand(2 * WARMUP_STEPS).tolist()
    limit = float(follow(values).limit(3.0))
    after, expected = follow([*values, 1e6]).state_dict(), follow([*values, limit]).state_dict()
    assert [float(after[name]) for name in after] == pytest.approx([float(expected[name]) for name in expected])


def test_a_loaded_state_continues_exactly() -> None:
    values = torch.rand(3 * WARMUP_STEPS).tolist()
    loaded = RunningDeviation(torch.device("cpu"))
    loaded.load_state_dict(follow(values[:40]).state_dict())
    assert follow(values[40:], loaded).state_dict() == follow(values).state_dict()
