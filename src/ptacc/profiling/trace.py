"""torch's profiler over a few steps, and named ranges for the parts of a step."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.profiler import profile, record_function

from ptacc.data.wrappers import Batches
from ptacc.model.patching import patched
from ptacc.types.aliases import T


@dataclass(frozen=True)
class Profile:
    """The profile of a few steps on this rank.

    Args:
        first_step: The number of the first profiled step.
        num_steps: The number of profiled steps that were completed; fewer than requested if the run ended earlier.
        table: The operators that took most time, as text.
        trace: The trace file; None if none was requested, or if it could not be written.
    """

    first_step: int
    num_steps: int
    table: str
    trace: Path | None


class StepProfiler:
    """Runs torch's profiler for a number of cycles of steps.

    Args:
        make: Creates the profiler of one cycle, given its `on_trace_ready` function.
        report: Creates the `Profile` of a cycle from its profiler and its number of steps; None if it is empty.
        cycles: The number of cycles.

    Attributes:
        ranges: The annotations of calls, which are removed after the last cycle.
        was_interrupted: Whether an exception ended the run. A cycle is then reported even if no step was completed.
        profiles: One for each recorded cycle.
    """

    def __init__(
        self,
        make: Callable[[Callable[[profile], None]], profile],
        report: Callable[[profile, int], Profile | None],
        cycles: int,
    ) -> None:
        self._make, self._report, self._cycles = make, report, cycles
        self.ranges: contextlib.ExitStack = contextlib.ExitStack()
        self.was_interrupted = False
        self.profiles: list[Profile] = []
        self._profiler: profile | None = None
        self._steps, self._is_recorded = 0, False

    @property
    def is_on(self) -> bool:
        """Whether a cycle is running."""
        return self._profiler is not None

    def start(self) -> None:
        """Start a cycle."""
        # A profiler for all cycles would keep, or lose, the events of the previous cycle.
        self._steps, self._is_recorded = 0, False
        self._profiler = self._make(self._keep_profile)
        self._profiler.start()

    def step(self) -> None:
        """Count a completed step. After the last step of a cycle, start the next one, or remove the annotations."""
        if self._profiler is None:
            return
        self._steps += 1
        self._profiler.step()
        if self._is_recorded:
            self._cycles -= 1
            self.stop()
            if self._cycles:
                self.start()
            else:
                self.ranges.close()

    def stop(self) -> None:
        """Stop the current cycle, and keep its profile."""
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()

    def _keep_profile(self, profiler: profile) -> None:
        self._is_recorded = True
        if (report := self._report(profiler, self._steps)) is not None:
            self.profiles.append(report)


# ---- ranges


@contextlib.contextmanager
def annotate_calls(owner: object, ranges: Mapping[str, str]) -> Generator[None]:
    """Run the calls of an object's methods in ranges, which are named by method, within the block."""
    with contextlib.ExitStack() as stack:
        for method, name in ranges.items():
            in_range = functools.partial(call_in_range, name, getattr(owner, method))
            stack.enter_context(patched(owner, method, in_range))
        yield


def call_in_range(name: str, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function in a named range."""
    with record_function(name):
        return function(*args, **kwargs)


def annotate_loading(profiler: StepProfiler, name: str, batches: Batches) -> Batches:
    """Load each batch in a named range while the profiler is on."""
    while profiler.is_on:
        with record_function(name):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch
    yield from batches
