"""Measure contenders: a contender and the plain loop take turns, and each ratio compares two consecutive turns."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from benchmarks.speed.contenders import CONTENDERS, PLAIN
from benchmarks.speed.processes import Timing, Worker, WorkerError, run_startup
from benchmarks.speed.ratios import Estimate, estimate
from benchmarks.speed.workloads import WORKLOADS, Workload

T = TypeVar("T")
Weights = npt.NDArray[np.float32]
SAME_WORK = 5e-3
"""Maximum difference of the weights after a short run, or of the losses of an evaluation.

With another order of the batches the weights differ by 2e-2 or more, with other draws of the augmentation by 9e-4.
"""


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

    def add_failure(self, workload: str, contender: str, error: WorkerError) -> None:
        """Store why a contender has no figures in a workload, in place of the figures."""
        self.failures[f"{workload}, {contender}"] = str(error)
        self.comparisons.pop((workload, contender), None)

    def add_versions(self, versions: dict[str, str]) -> None:
        """Store the versions of the contenders.

        Raises:
            WorkerError: There are results of another version.
        """
        merged = self.versions | versions
        if changed := [name for name, version in self.versions.items() if merged[name] != version]:
            raise WorkerError(f"{', '.join(changed)}: the existing results are of another version")
        self.versions = merged


def compare(contenders: Sequence[str], names: Iterable[str], pairs: int, folder: Path, results: Results) -> None:
    """Measure pairs of turns of one or two contenders in each workload that they support, in new processes.

    Raises:
        WorkerError: The plain loop cannot be measured.
    """
    for processes, group in group_by_processes(names):
        able = [name for name in contenders if processes == 1 or CONTENDERS[name].is_distributed]
        if not able:
            continue
        with contextlib.ExitStack() as stack:
            plain, *others = (Worker(name, folder, processes=processes) for name in (PLAIN, *able))
            for worker in (plain, *others):
                stack.enter_context(worker)
            plain.wait_until_ready()
            ready = [worker for worker in others if is_ready(worker, plain, results)]
            for workload in group:
                workers = [worker for worker in ready if workload.run in worker.runs]
                measure(plain, workers, workload, pairs, folder, results)


def group_by_processes(names: Iterable[str]) -> Iterator[tuple[int, list[Workload]]]:
    """Group workloads by their number of processes."""
    workloads = sorted((WORKLOADS[name] for name in names), key=lambda workload: workload.processes)
    for processes, group in itertools.groupby(workloads, key=lambda workload: workload.processes):
        yield processes, list(group)


def is_ready(worker: Worker, plain: Worker, results: Results) -> bool:
    """Wait for a contender and store its version, or store the reason why it cannot be measured."""
    try:
        worker.wait_until_ready()
        results.add_versions({PLAIN: plain.version, worker.contender: worker.version})
    except WorkerError as error:
        results.failures[worker.contender] = str(error)
    return worker.contender not in results.failures


def measure(
    plain: Worker, workers: Sequence[Worker], workload: Workload, pairs: int, folder: Path, results: Results
) -> None:
    """Measure pairs of turns in one workload. The order of the turns alternates."""
    comparisons = [warm_up(plain, worker, workload, folder, results) for worker in workers]
    measured = [(worker, each) for worker, each in zip(workers, comparisons, strict=True) if each is not None]
    for number in range(pairs if measured else 0):
        try:
            turns = take_turns(plain, [worker for worker, _ in measured], workload, is_reversed=number % 2 == 1)
        except WorkerError as error:
            for worker, _ in measured:
                results.add_failure(workload.name, worker.contender, error)
            return
        for worker, comparison in measured:
            comparison.pairs.append((turns[PLAIN], turns[worker.contender]))


def warm_up(plain: Worker, worker: Worker, workload: Workload, folder: Path, results: Results) -> Comparison | None:
    """Run the same short run with both. Return their comparison, or store the reason why there is none."""
    key = workload.name, worker.contender
    file = folder / "weights.npy"
    try:
        runs = [(each.run(workload.name, workload.short, file), np.load(file)) for each in (plain, worker)]
        difference = check_same_work(workload, *runs)
    except WorkerError as error:
        results.add_failure(*key, error)
        return None
    comparison = results.comparisons.setdefault(key, Comparison(*key, difference))
    comparison.difference = max(comparison.difference, difference)
    return comparison


def check_same_work(workload: Workload, plain: tuple[Timing, Weights], other: tuple[Timing, Weights]) -> float:
    """Return the largest difference between the weights of two runs, or between the losses of two evaluations.

    Raises:
        WorkerError: The runs took other steps.
    """
    (timing, weights), (other_timing, other_weights) = plain, other
    if timing.steps != other_timing.steps:
        raise WorkerError(f"{other_timing.steps} steps in place of {timing.steps}")
    values = (timing.loss, other_timing.loss) if workload.evaluates else (weights, other_weights)
    difference = float(np.abs(np.subtract(*values)).max())
    if not difference < SAME_WORK:
        raise WorkerError(f"the difference to the plain loop is {difference:.0e}")
    return difference


def take_turns(plain: Worker, workers: Sequence[Worker], workload: Workload, *, is_reversed: bool) -> dict[str, Turn]:
    """Return a turn of the plain loop and of each worker. The long runs are consecutive: see `order_turns`."""
    order = order_turns(plain, workers, is_reversed=is_reversed)
    shorts = {each.contender: each.run(workload.name, workload.short) for each in order}
    longs = {each.contender: each.run(workload.name, workload.long) for each in reversed(order)}
    return {name: Turn(shorts[name], longs[name]) for name in shorts}


def order_turns(plain: T, others: Sequence[T], *, is_reversed: bool) -> list[T]:
    """Return the order in which one or two contenders run next to the plain loop, under the same load of the machine.

    Example:
        >>> order_turns("plain", ["ptacc", "ignite"], is_reversed=False)
        ['ptacc', 'plain', 'ignite']
    """
    first, *rest = others
    order = [first, plain, *rest]
    return order[::-1] if is_reversed else order


def measure_startup(contender: str, results: Results) -> None:
    """Start a contender once in a fresh process, and store its startup cost."""
    sample = run_startup(contender)
    assert all(math.isfinite(value) for part in sample.values() for value in part.values())
    results.startups.setdefault(contender, Startup(contender)).samples.append(sample)
