"""Observing monitored values."""

import pytest

from ptacc.core.monitoring import Patience
from ptacc.types.monitor import Monitor


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_is_the_best_in_its_mode(mode: str) -> None:
    patience = Patience(Monitor("x", mode="min" if mode == "min" else "max"))
    for value in (2.0, 1.0, 3.0):
        patience.observe(value)
    assert patience.best == (1.0 if mode == "min" else 3.0)
