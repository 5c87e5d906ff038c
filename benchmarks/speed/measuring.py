"""Measuring: a contender and the plain loop take turns, and every ratio is of neighbours."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.speed.contenders import PLAIN
from benchmarks.speed.processes import Taken, Worker, WorkerError, begin
from benchmarks.speed.ratios import Estimate, estimate
from benchmarks.speed.workloads import WORKLOADS, Workload


@dataclass(frozen=True)
class Turn:
    """One turn of a contender: a short run and a long one."""

    short: Taken
    long: Taken

    def seconds(self, clock: str) -> float:
        """Return the time of what the long run does more, by `"cpu"` or by `"wall"`."""
        taken: float = getattr(self.long, clock) - getattr(self.short, clock)
        return taken


@dataclass
class Comparison:
    """A contender beside the plain loop in one workload.

    Args:
        workload: The workload's name.
        contender: The contender's name.
        difference: The largest difference between their weights after the same short run, or, in an evaluation,
            between the losses.
        pairs: Turns of the plain loop and of the contender, next to each other.
    """

    workload: str
    contender: str
    difference: float
    pairs: list[tuple[Turn, Turn]] = field(default_factory=list)

    def ratio(self, clock: str) -> Estimate:
        """Return the contender's time over the plain loop's."""
        return estimate([theirs.seconds(clock) / plain.seconds(clock) for plain, theirs in self.pairs])

    def quiet_ratio(self) -> Estimate | None:
        """Return the ratio of steps that nothing came between, None where there are none."""
        steps = [(plain.long.quiet_step, theirs.long.quiet_step) for plain, theirs in self.pairs]
        return estimate([theirs / plain for plain, theirs in steps]) if all(map(all, steps)) else None

    def microseconds(self, clock: str) -> tuple[float, float]:
        """Return the median time of a batch: the plain loop's, and the contender's."""
        batches = WORKLOADS[self.workload].batches
        plain, theirs = (np.median([turn.seconds(clock) for turn in turns]) for turns in zip(*self.pairs, strict=True))
        return 1e6 * float(plain) / batches, 1e6 * float(theirs) / batches


@dataclass
class Beginning:
    """What it costs a contender to begin.

    Args:
        contender: Its name.
        samples: What fresh processes told: seconds and MiB, by what they are of.
    """

    contender: str
    samples: list[dict[str, dict[str, float]]] = field(default_factory=list)

    def of(self, what: str, part: str) -> Estimate:
        """Return one of the figures: `"import", "cpu"`, for one."""
        return estimate([sample[what][part] for sample in self.samples])


@dataclass
class Results:
    """All that was measured, and why some of it was not."""

    comparisons: dict[tuple[str, str], Comparison] = field(default_factory=dict)
    beginnings: dict[str, Beginning] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def note_versions(self, versions: dict[str, str]) -> None:
        """Note what is compared; figures of several versions of one library cannot be put together.

        Raises:
            WorkerError: There are figures of another version.
        """
        known = self.versions | versions
        if changed := [name for name, version in self.versions.items() if known[name] != version]:
            raise WorkerError(f"{', '.join(changed)}: the results so far are of another version")
        self.versions = known


def compare(contender: str, names: Collection[str], pairs: int, folder: Path, results: Results) -> None:
    """Take some pairs of turns in each workload that the contender takes on, in processes started for it."""
    for processes, group in by_processes(names):
        with Worker(PLAIN, folder, processes=processes) as plain, Worker(contender, folder, processes=processes) as one:
            results.note_versions({PLAIN: plain.version, contender: one.version})
            for workload in group:
                if workload.name in one.workloads:
                    measure(plain, one, workload, pairs, folder, results)


def by_processes(names: Iterable[str]) -> Iterator[tuple[int, list[Workload]]]:
    """Group workloads by the number of their processes."""
    asked = sorted((WORKLOADS[name] for name in names), key=lambda workload: workload.processes)
    for processes, group in itertools.groupby(asked, key=lambda workload: workload.processes):
        yield processes, list(group)


def measure(plain: Worker, one: Worker, workload: Workload, pairs: int, folder: Path, results: Results) -> None:
    """Take pairs of turns in one workload, the first to begin changing from pair to pair."""
    key = workload.name, one.contender
    try:
        difference = warm_up(plain, one, workload, folder)
        comparison = results.comparisons.setdefault(key, Comparison(*key, difference))
        comparison.difference = max(comparison.difference, difference)
        for _ in range(pairs):
            comparison.pairs.append(take_turns(plain, one, workload, plain_first=len(comparison.pairs) % 2 == 0))
    except WorkerError as error:
        results.failures[f"{workload.name}, {one.contender}"] = str(error)
        results.comparisons.pop(key, None)


def warm_up(plain: Worker, one: Worker, workload: Workload, folder: Path) -> float:
    """Do the same short run with both, and return the largest difference in what came of it."""
    files = [folder / f"{worker.contender}.npy" for worker in (plain, one)]
    taken = [worker.do(workload.name, workload.short, file) for worker, file in zip((plain, one), files, strict=True)]
    if workload.evaluates:
        return abs(taken[0].loss - taken[1].loss)
    weights = [np.load(file) for file in files]
    return float(np.abs(weights[0] - weights[1]).max())


def take_turns(plain: Worker, one: Worker, workload: Workload, *, plain_first: bool) -> tuple[Turn, Turn]:
    """Take one pair of turns: both long runs stand next to each other, and so does the load of the machine in them."""
    order = (plain, one) if plain_first else (one, plain)
    shorts = {worker.contender: worker.do(workload.name, workload.short) for worker in order}
    longs = {worker.contender: worker.do(workload.name, workload.long) for worker in reversed(order)}
    turns = [Turn(shorts[worker.contender], longs[worker.contender]) for worker in (plain, one)]
    return turns[0], turns[1]


def begin_afresh(contender: str, results: Results) -> None:
    """Begin once in a fresh process, and note what it cost."""
    told = begin(contender)
    assert all(math.isfinite(value) for part in told.values() for value in part.values())
    results.beginnings.setdefault(contender, Beginning(contender)).samples.append(told)
