"""Parts of the state of a run: keys of the mixins' states, the current epoch, and the saved run to resume."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Generic, cast

from torch import Tensor

from ptacc.types.aliases import T
from ptacc.types.outputs import EvalResult
from ptacc.types.progress import Progress
from ptacc.types.protocols import StateDict


@dataclass(frozen=True, eq=False)
class StateKey(Generic[T]):
    """The typed key of a mixin's part of the run state: `self.run[EMA_STATE]` is an `EMAState`.

    Args:
        name: Name of the part in checkpoints.
        each_rank: Whether each rank has a state of its own. By default the state is the same on all ranks.
        saved: Whether the state belongs in checkpoints. A state without `state_dict` and `load_state_dict` stays out of
            them, with a warning. `saved=False` declares that it need not be saved.

    Example:
        >>> COUNTS: StateKey[list[int]] = StateKey("counts")
    """

    name: str
    each_rank: bool = False
    saved: bool = True


@dataclass(frozen=True)
class ResumeState:
    """A saved run, to be resumed.

    Args:
        shared: State that all ranks share: `Run.state_dict()`.
        rank_state: State of this rank: `Run.rank_state_dict()`.
    """

    shared: StateDict
    rank_state: StateDict

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return cast(int, self.shared["seed"])

    @property
    def progress(self) -> Progress:
        """Progress of the run when it was saved."""
        return Progress(**self.shared["progress"])

    @property
    def invariants(self) -> Mapping[str, str]:
        """What must be the same when the run is resumed, by name."""
        return cast(Mapping[str, str], self.shared["conditions"])


@dataclass
class EpochState:
    """The state of the current epoch.

    Args:
        first_step: Number of steps of the run before the epoch, with those that were skipped.
        items: Number of items trained on, over all ranks.
        num_batches: Number of batches of the epoch on each rank; None for data without a length, and before the
            epoch's data is read.
        data: Describes the data of the epoch.
        left_out: Number of batches in windows whose batches were all left out.
        started: Time at which the epoch began, on the monotonic clock.
        learning_rate: Learning rate of the last step.
        evaluations: Results of the evaluations within the epoch, by the name of the set.
        is_exhausted: Whether all data of the epoch was trained on.
        is_counted: Whether the epoch is included in `progress.epochs`.
    """

    first_step: int = 0
    items: float = 0.0
    num_batches: int | None = None
    data: str = ""
    left_out: int = 0
    started: float = field(default_factory=time.monotonic)
    learning_rate: float | Tensor = 0.0
    evaluations: dict[str, EvalResult] = field(default_factory=dict)
    is_exhausted: bool = False
    is_counted: bool = False

    def state_dict(self) -> StateDict:
        """Return the state. It is the same on all ranks."""
        return {
            "first_step": self.first_step,
            "items": self.items,
            "seconds": time.monotonic() - self.started,
            "learning_rate": self.learning_rate,
            "data": self.data,
            "left_out": self.left_out,
            "is_exhausted": self.is_exhausted,
            "evaluations": {name: asdict(result) for name, result in self.evaluations.items()},
        }

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore the state."""
        self.first_step, self.items = state_dict["first_step"], state_dict["items"]
        self.started = time.monotonic() - state_dict["seconds"]
        self.learning_rate, self.is_exhausted = state_dict["learning_rate"], state_dict["is_exhausted"]
        self.data, self.left_out = state_dict["data"], state_dict["left_out"]
        self.evaluations = {name: EvalResult(**result) for name, result in state_dict["evaluations"].items()}
