"""Measure contenders: a contender and the plain loop take turns, and each ratio compares two consecutive turns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.speed.contenders import PLAIN
from benchmarks.speed.processes import Timing, Worker, WorkerError, run_startup
from benchmarks.speed.ratios import Estimate, estimate
from benchmarks.speed.workloads import WORKLOADS, Workload


@dataclass(frozen=True)
class Turn:
    """One turn of a contender: a short run and a long run."""

    short: Timing
    long: Timing

    def seconds(self, clock: str) -> float:
        """Return the time of the long run minus the time of the short run, for the clock `"cpu"` or `"wall"`."""
        difference: float = getattr(self.long, clock) - getattr(self.short, clock)
        return difference


@dataclass
class Comparison:
    """A contender compared with the plain loop in one workload.

    Args:
        workload: The name of the workload.
        contender: The name of the contender.
        difference: The largest difference between their weights after the same short run. In an evaluation, the
            difference between their losses.
        pairs: Consecutive turns of the plain loop and of the contender.
    """

    workload: str
    contender: str
    difference: float
    pairs: list[tuple[Turn, Turn]] = field(default_factory=list)

    def ratio(self, clock: str) -> Estimate:
        """Return the ratio of the contender's time to the plain loop's."""
        return estimate([contender.seconds(clock) / plain.seconds(clock) for plain, contender in self.pairs])

    def quiet_ratio(self) -> Estimate | None:
        """Return the ratio of the quiet steps, or None if there are none."""
        steps = [(plain.long.quiet_step, contender.long.quiet_step) for plain, contender in self.pairs]
        return estimate([contender / plain for plain, contender in steps]) if all(map(all, steps)) else None

    def microseconds(self, clock: str) -> tuple[float, float]:
        """Return the median time per batch of the plain loop and of the contender."""
        batches = WORKLOADS[self.workload].batches
        medians = (np.median([turn.seconds(clock) for turn in turns]) for turns in zip(*self.pairs, strict=True))
        plain, contender = (1e6 * float(median) / batches for median in medians)
        return plain, contender


@dataclass
class Startup:
    """The startup cost of a contender.

    Args:
        contender: The name of the contender.
        samples: Seconds and MiB by name, one sample per fresh process.
    """

    contender: str
    samples: list[dict[str, dict[str, float]]] = field(default_factory=list)

    def estimate(self, name: str, part: str) -> Estimate:
        """Return one figure, such as `"import", "cpu"`."""
        return estimate([sample[name][part] for sample in self.samples])


@dataclass
class Results:
    """All measurements, and the reasons for missing ones."""

    comparisons: dict[tuple[str, str], Comparison] = field(default_factory=dict)
    startups: dict[str, Startup] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def add_versions(self, versions: dict[str, str]) -> None:
        """Store the versions of the contenders.

        Raises:
            WorkerError: There are results of another version.
        """
        merged = self.versions | versions
        if changed := [name for name, version in self.versions.items() if merged[name] != version]:
            raise WorkerError(f"{', '.join(changed)}: the existing results are of another version")
        self.versions = merged


def compare(contender: str, names: Collection[str], pairs: int, folder: Path, results: Results) -> None:
    """Measure pairs of turns in each workload that the contender supports, in new processes."""
    for processes, group in group_by_processes(names):
        with (
            Worker(PLAIN, folder, processes=processes) as plain,
            Worker(contender, folder, processes=processes) as worker,
        ):
            results.add_versions({PLAIN: plain.version, contender: worker.version})
            for workload in group:
                if workload.name in worker.workloads:
                    measure(plain, worker, workload, pairs, folder, results)


def group_by_processes(names: Iterable[str]) -> Iterator[tuple[int, list[Workload]]]:
    """Group workloads by their number of processes."""
    workloads = sorted((WORKLOADS[name] for name in names), key=lambda workload: workload.processes)
    for processes, group in itertools.groupby(workloads, key=lambda workload: workload.processes):
        yield processes, list(group)


def measure(plain: Worker, worker: Worker, workload: Workload, pairs: int, folder: Path, results: Results) -> None:
    """Measure pairs of turns in one workload. The order within a pair alternates."""
    key = workload.name, worker.contender
    try:
        difference = warm_up(plain, worker, workload, folder)
        comparison = results.comparisons.setdefault(key, Comparison(*key, difference))
        comparison.difference = max(comparison.difference, difference)
        for _ in range(pairs):
            plain_first = len(comparison.pairs) % 2 == 0
            comparison.pairs.append(measure_pair(plain, worker, workload, plain_first=plain_first))
    except WorkerError as error:
        results.failures[f"{workload.name}, {worker.contender}"] = str(error)
        results.comparisons.pop(key, None)


def warm_up(plain: Worker, worker: Worker, workload: Workload, folder: Path) -> float:
    """Run the same short run with both, and return the largest difference between the weights or losses."""
    workers = (plain, worker)
    files = [folder / f"{each.contender}.npy" for each in workers]
    timings = [each.run(workload.name, workload.short, file) for each, file in zip(workers, files, strict=True)]
    if workload.evaluates:
        return abs(timings[0].loss - timings[1].loss)
    weights = [np.load(file) for file in files]
    return float(np.abs(weights[0] - weights[1]).max())


def measure_pair(plain: Worker, worker: Worker, workload: Workload, *, plain_first: bool) -> tuple[Turn, Turn]:
    """Measure one pair of turns. The long runs are consecutive, so both see the same load of the machine."""
    order = (plain, worker) if plain_first else (worker, plain)
    shorts = {each.contender: each.run(workload.name, workload.short) for each in order}
    longs = {each.contender: each.run(workload.name, workload.long) for each in reversed(order)}
    turns = [Turn(shorts[each.contender], longs[each.contender]) for each in (plain, worker)]
    return turns[0], turns[1]


def measure_startup(contender: str, results: Results) -> None:
    """Start a contender once in a fresh process, and store its startup cost."""
    sample = run_startup(contender)
    assert all(math.isfinite(value) for part in sample.values() for value in part.values())
    results.startups.setdefault(contender, Startup(contender)).samples.append(sample)
