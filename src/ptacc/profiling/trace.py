"""torch's profiler over a few steps, and the ranges by which a trace tells their parts apart."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.profiler import profile, record_function

from ptacc.data.wrappers import Batches
from ptacc.model.patching import Patch
from ptacc.types.aliases import T


@dataclass(frozen=True)
class Profile:
    """What a few steps did, on this process.

    Args:
        first_step: The number of the first of them.
        num_steps: How many of them were completed: fewer than asked for where the run ended before.
        table: The operators that took most time, for people to read.
        trace: The trace file; None where none was asked for, or it could not be written.
    """

    first_step: int
    num_steps: int
    table: str
    trace: Path | None


class StepProfiler:
    """torch's profiler, moved on from step to step until it has seen what it is to see.

    Attributes:
        marks: What is undone when there is no more to see.
        is_broken_off: Whether an exception ended the run, so that what it was at is of interest.
        profiles: One for each cycle that was recorded.
    """

    def __init__(
        self,
        make: Callable[[Callable[[profile], None]], profile],
        report: Callable[[profile, int], Profile | None],
        cycles: int,
    ) -> None:
        """See some cycles of steps.

        Args:
            make: Makes the profiler of one cycle, given what takes that in.
            report: Makes a profile of a cycle, given how many steps it saw; None where there is nothing in it.
            cycles: How many.
        """
        self._make, self._report, self._cycles = make, report, cycles
        self.marks = contextlib.ExitStack()
        self.is_broken_off = False
        self.profiles: list[Profile] = []
        self._profiler: profile | None = None
        self._steps, self._is_recorded = 0, False

    @property
    def is_on(self) -> bool:
        """Whether there is more to see."""
        return self._profiler is not None

    def start(self) -> None:
        """Start a cycle."""
        # Each has a profiler of its own: one for all would keep, or lose, the events of the cycle before.
        self._steps, self._is_recorded = 0, False
        self._profiler = self._make(self._take)
        self._profiler.start()

    def step(self) -> None:
        """Take in that a step was completed."""
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
                self.marks.close()

    def stop(self) -> None:
        """End a cycle where it is, and keep what it has recorded."""
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()

    def _take(self, profiler: profile) -> None:
        self._is_recorded = True
        if (found := self._report(profiler, self._steps)) is not None:
            self.profiles.append(found)


# ---- ranges


@contextlib.contextmanager
def marked_calls(owner: object, ranges: Mapping[str, str]) -> Iterator[None]:
    """Surround the calls of an object's methods by ranges; at the block's end it has the attributes that it had."""
    own = {name: value for name, value in vars(owner).items() if name in ranges}
    for method, name in ranges.items():
        called = getattr(owner, method)
        vars(owner)[method] = Patch(called, functools.partial(call_within, name, called))
    try:
        yield
    finally:
        for method in ranges:
            del vars(owner)[method]
        vars(owner).update(own)


def call_within(name: str, called: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function within a range."""
    with record_function(name):
        return called(*args, **kwargs)


def marked_loading(profiler: StepProfiler, name: str, batches: Batches) -> Batches:
    """Surround the loading of each batch by a range, as long as there is more to see."""
    while profiler.is_on:
        with record_function(name):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch
    yield from batches
