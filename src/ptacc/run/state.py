"""What the state of a run is made of: the keys to mixins' parts, what an epoch gathers, and a run as it was saved."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, cast

import torch
from torch import Tensor

from ptacc.types.aliases import T
from ptacc.types.outputs import EvalResult
from ptacc.types.progress import Progress
from ptacc.types.protocols import StateDict


@dataclass(frozen=True, eq=False)
class StateKey(Generic[T]):
    """The typed key to a mixin's part of the run state: `self.run[EMA_STATE]` is an `EMAState`.

    Args:
        name: What a checkpoint calls it.
        each_rank: Whether each process has a state of its own, and not all the same.

    Example:
        >>> COUNTS: StateKey[list[int]] = StateKey("counts")
    """

    name: str
    each_rank: bool = False


@dataclass(frozen=True)
class ResumeState:
    """A run as it was saved, to go on with.

    Args:
        shared: What all processes have in common: `Run.state_dict()`.
        own: What was this process's own: `Run.own_state_dict()`.
    """

    shared: StateDict
    own: StateDict

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return cast(int, self.shared["seed"])

    @property
    def progress(self) -> Progress:
        """How far the run was."""
        return Progress(**self.shared["progress"])

    @property
    def conditions(self) -> Mapping[str, str]:
        """What has to be the same when it goes on, by name."""
        return cast(Mapping[str, str], self.shared["conditions"])


class LossSum:
    """The sum of an epoch's losses, kept on the device in the widest type it has, and the number of its items."""

    def __init__(self, device: torch.device) -> None:
        """Start from nothing."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.total: Tensor = torch.zeros((), dtype=dtype, device=device)
        self.items: float = 0.0

    def add(self, mean: Tensor, items: float) -> None:
        """Add a mean over `items` items."""
        self.total.add_(mean, alpha=items)
        self.items += items


@dataclass
class EpochState:
    """What is gathered while an epoch runs.

    Args:
        losses: The training loss so far.
        num_batches: Batches that each process will have trained on at its end; None where the data has no length.
        started: When it began, on the monotonic clock.
        learning_rate: As used by the last step.
        evaluations: What was evaluated in it, by the name of the set.
        is_exhausted: Whether its data has come to an end.
        is_counted: Whether it was counted as an epoch gone through.
    """

    losses: LossSum
    num_batches: int | None
    started: float = field(default_factory=time.monotonic)
    learning_rate: float | Tensor = 0.0
    evaluations: dict[str, EvalResult] = field(default_factory=dict)
    is_exhausted: bool = False
    is_counted: bool = False
