"""Schedules that rise linearly, and then fall."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection
from typing import Literal, TypeAlias

from ptacc.errors import OptionError
from ptacc.schedules.factors import Factor, FactorSchedule
from ptacc.types.progress import RunPlan, Steps
from ptacc.validation import check_choice

Length: TypeAlias = float | Steps
"""A part of a run: a share of its steps, or `Steps(n)`."""


def warmup_cosine(
    warmup: Length = 0.0, *, final: float = 0.0, setting: str = "lr", groups: Collection[str] | None = None
) -> FactorSchedule:
    """Return a schedule that rises linearly, and then falls as half a cosine wave.

    Args:
        warmup: The part of the run that it rises in.
        final: The factor at the end of the run.
        setting: As for `FactorSchedule`.
        groups: As for `FactorSchedule`.

    Source: Loshchilov and Hutter, 2017, https://arxiv.org/abs/1608.03983
    """

    def fall(share: float) -> float:
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * share))

    return FactorSchedule(make_falling(warmup, 1.0, fall), setting, groups)


def warmup_linear(
    warmup: Length = 0.0, *, final: float = 0.0, setting: str = "lr", groups: Collection[str] | None = None
) -> FactorSchedule:
    """Return a schedule that rises linearly, and then falls linearly. The arguments are those of `warmup_cosine`."""
    return FactorSchedule(make_falling(warmup, 1.0, lambda share: 1.0 + (final - 1.0) * share), setting, groups)


def warmup_stable_decay(
    warmup: Length = 0.0,
    *,
    decay: Length = 0.1,
    shape: Literal["linear", "sqrt"] = "linear",
    final: float = 0.0,
    setting: str = "lr",
    groups: Collection[str] | None = None,
) -> FactorSchedule:
    """Return a schedule that rises linearly, stays at 1, and falls in the last part of the run.

    A checkpoint from before the decay can be continued to any length: see `decay_start`.

    Args:
        warmup: The part of the run that it rises in.
        decay: The part of the run that it falls in.
        shape: Falls linearly, or by the square root of the share of the decay that is over.
        final: The factor at the end of the run.
        setting: As for `FactorSchedule`.
        groups: As for `FactorSchedule`.

    Source: Hägele et al., 2024, https://arxiv.org/abs/2405.18392
    """
    check_choice("warmup_stable_decay", "shape", shape, ("linear", "sqrt"), "linear")
    check_length("decay", decay)

    def fall(share: float) -> float:
        return 1.0 + (final - 1.0) * (math.sqrt(share) if shape == "sqrt" else share)

    return FactorSchedule(make_falling(warmup, decay, fall), setting, groups)


def inverse_sqrt(warmup: Length, *, setting: str = "lr", groups: Collection[str] | None = None) -> FactorSchedule:
    """Return a schedule that rises linearly, and then falls with the square root of the number of steps.

    Args:
        warmup: The part of the run that it rises in. With `Steps(n)`, the run may have any length.
        setting: As for `FactorSchedule`.
        groups: As for `FactorSchedule`.

    Source: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762
    """
    check_length("warmup", warmup)

    def make_factor(plan: RunPlan) -> Factor:
        rise = count_steps(warmup, plan)
        return lambda step: min((step + 1) / (rise + 1), math.sqrt((rise + 1) / (step + 1)))

    return FactorSchedule(make_factor, setting, groups)


def decay_start(decay: Length, plan: RunPlan) -> int:
    """Return the number of steps after which `warmup_stable_decay(decay=decay)` begins to fall.

    Save a checkpoint after this step. A longer run can resume from it, with a decay of its own.
    """
    return plan.total_steps - count_steps(decay, plan)


def make_falling(warmup: Length, decay: Length, fall: Callable[[float], float]) -> Callable[[RunPlan], Factor]:
    """Return what makes the factor of a run from its plan: it rises, stays at 1, and falls at the end.

    Args:
        warmup: The part of the run that it rises in.
        decay: The part of the run that it falls in; less if the warm-up leaves less.
        fall: From the share of the decay that is over to the factor.
    """
    check_length("warmup", warmup)

    def make_factor(plan: RunPlan) -> Factor:
        total, rise = plan.total_steps, count_steps(warmup, plan)
        if rise >= total:
            warnings.warn(f"The warm-up of {rise} steps does not end in a run of {total} steps.", stacklevel=2)
        start = max(total - count_steps(decay, plan), rise)

        def factor(step: int) -> float:
            if step < rise:
                return (step + 1) / (rise + 1)
            return 1.0 if step <= start else fall(min((step - start) / (total - start), 1.0))

        return factor

    return make_factor


def count_steps(length: Length, plan: RunPlan) -> int:
    """Return the steps of a part of a run."""
    return length.n if isinstance(length, Steps) else round(length * plan.total_steps)


def check_length(name: str, length: object) -> None:
    """Raise `OptionError` for what is not a part of a run."""
    is_share = isinstance(length, int | float) and not isinstance(length, bool) and 0 <= length <= 1
    if not is_share and not isinstance(length, Steps):
        raise OptionError(f"{name}={length!r}: must be a share of the run from 0 to 1, or Steps(n).")
