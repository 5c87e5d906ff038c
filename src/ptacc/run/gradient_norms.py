"""The running mean and deviation of the gradient norm, on the device, and the limit that follows from them."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from ptacc.types.protocols import StateDict

DECAY: Final = 0.97
WARMUP_STEPS: Final = 25
"""Both as in ZClip (Kumar et al., 2025, https://arxiv.org/abs/2504.02507)."""


class GradientNorms:
    """The exponential mean and deviation of gradient norms. Nothing is read from the device.

    The first norms are averaged with equal weights, until each has the weight `1 - DECAY`. A norm above the limit
    counts as the limit, and NaN and infinity do not count.

    Args:
        device: The device of the norms.
    """

    def __init__(self, device: torch.device) -> None:
        self._count = torch.zeros((), device=device)
        self._mean = torch.zeros((), device=device)
        self._variance = torch.zeros((), device=device)

    def limit(self, deviations: float) -> Tensor:
        """Return the mean plus a number of standard deviations: a scalar, infinite for the first `WARMUP_STEPS`."""
        limit = self._mean + deviations * self._variance.sqrt()
        return torch.where(self._count < WARMUP_STEPS, torch.inf, limit)

    def add(self, norm: Tensor, limit: Tensor) -> None:
        """Add the norm of a step, a scalar, whose limit was `limit`."""
        is_finite = norm.isfinite()
        self._count = self._count + is_finite
        weight = (1 / self._count.clamp(min=1)).clamp(min=1 - DECAY)
        change = torch.where(is_finite, torch.minimum(norm, limit.to(norm.dtype)) - self._mean, 0.0)
        variance = (1 - weight) * (self._variance + weight * change.square())
        self._variance = torch.where(is_finite, variance, self._variance)
        self._mean = self._mean + weight * change

    def state_dict(self) -> StateDict:
        """Return the mean, the variance, and the number of norms, at most as many as float32 counts."""
        return {"count": self._count, "mean": self._mean, "variance": self._variance}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load what `state_dict` returned."""
        device = self._count.device
        self._count, self._mean, self._variance = (
            state_dict[name].to(device) for name in ("count", "mean", "variance")
        )
