"""The running mean and deviation of a gradient norm or a loss, and the limit above which a value is a spike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from ptacc.types.protocols import StateDict

DECAY: Final = 0.97
WARMUP_STEPS: Final = 25
"""Both as in ZClip (Kumar et al., 2025, https://arxiv.org/abs/2504.02507)."""


class RunningDeviation:
    """The exponential mean and deviation of a value. Nothing is read from its device.

    The first values are averaged with equal weights, until each has the weight `1 - DECAY`. A value above the limit
    counts as the limit, and NaN and infinity do not count.

    Args:
        device: The device of the values.
    """

    def __init__(self, device: torch.device) -> None:
        self._count = torch.zeros((), device=device)
        self._mean = torch.zeros((), device=device)
        self._variance = torch.zeros((), device=device)

    def limit(self, deviations: float) -> Tensor:
        """Return the mean plus a number of standard deviations: a scalar, infinite for the first `WARMUP_STEPS`."""
        limit = self._mean + deviations * self._variance.sqrt()
        return torch.where(self._count < WARMUP_STEPS, torch.inf, limit)

    def describe(self) -> str:
        """Describe the mean and the deviation. Reads from the device."""
        return f"mean {float(self._mean):.4g}, deviation {float(self._variance) ** 0.5:.4g}"

    def add(self, value: Tensor, limit: Tensor) -> None:
        """Add the value of a step, a scalar, whose limit was `limit`."""
        is_finite = value.isfinite()
        self._count = self._count + is_finite
        weight = (1 / self._count.clamp(min=1)).clamp(min=1 - DECAY)
        change = torch.where(is_finite, torch.minimum(value, limit.to(value.dtype)) - self._mean, 0.0)
        variance = (1 - weight) * (self._variance + weight * change.square())
        self._variance = torch.where(is_finite, variance, self._variance)
        self._mean = self._mean + weight * change

    def state_dict(self) -> StateDict:
        """Return the mean, the variance, and the number of values, at most as many as float32 counts."""
        return {"count": self._count, "mean": self._mean, "variance": self._variance}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load what `state_dict` returned."""
        device = self._count.device
        self._count, self._mean, self._variance = (
            state_dict[name].to(device) for name in ("count", "mean", "variance")
        )


class SpikeGuard:
    """Finds the steps whose values are spikes. It computes on the host.

    Args:
        deviations: Number of standard deviations above the running mean from which a value is a spike, by its name.
    """

    def __init__(self, deviations: Mapping[str, float]) -> None:
        self._deviations = deviations
        self._running = {name: RunningDeviation(torch.device("cpu")) for name in deviations}

    def find(self, values: Mapping[str, float]) -> dict[str, str]:
        """Add the values of a step, and return descriptions of those that are spikes, by name.

        NaN and infinity are not spikes.
        """
        found = {}
        for name, deviations in self._deviations.items():
            running, value = self._running[name], torch.tensor(values[name], dtype=torch.float64, device="cpu")
            limit = running.limit(deviations)
            if limit < value < math.inf:
                found[name] = f"{name} {values[name]:.4g} ({running.describe()}, limit {float(limit):.4g})"
            running.add(value, limit)
        return found

    def state_dict(self) -> StateDict:
        """Return the running means and deviations by name."""
        return {name: running.state_dict() for name, running in self._running.items()}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load what `state_dict` returned. A value that it lacks was not guarded before."""
        for name in self._running.keys() & state_dict.keys():
            self._running[name].load_state_dict(state_dict[name])
