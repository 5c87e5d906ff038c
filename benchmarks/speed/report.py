"""What was measured, as JSON and as tables in Markdown."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.speed.contenders import CONTENDERS, PLAIN
from benchmarks.speed.measuring import Beginning, Comparison, Results, Turn
from benchmarks.speed.processes import Taken
from benchmarks.speed.ratios import Estimate
from benchmarks.speed.workloads import WORKLOADS, Workload

IMPORT_GOAL = 0.3
"""Seconds on top of torch and Accelerate."""
MEMORY_GOAL = 1.02
"""Times the plain loop's."""
PEERS_HEAD = ("us", "ratio (CPU)", "ratio (clock)", "quiet steps")


@dataclass
class Circumstances:
    """Where and when it was measured.

    Args:
        machine: The processor.
        cores: How many of it this process may use.
        python: The version of Python.
        started: When it began, on the monotonic clock.
        loads: How many processes wanted to run, whenever something was written.
        seconds: How long it took up to then, with the time of earlier runs that this one adds to.
    """

    machine: str
    cores: int
    python: str
    started: float
    loads: list[float]
    seconds: float = 0.0

    @classmethod
    def now(cls) -> Circumstances:
        """Look at the machine."""
        cores = len(os.sched_getaffinity(0))
        return cls(processor(), cores, platform.python_version(), time.monotonic(), [os.getloadavg()[0]])

    def look(self) -> None:
        """Look at its load again."""
        self.loads.append(os.getloadavg()[0])
        self.seconds = time.monotonic() - self.started

    def go_on_from(self, earlier: Circumstances) -> None:
        """Count an earlier run in.

        Raises:
            ValueError: It was made on another machine.
        """
        here, there = ((each.machine, each.cores, each.python) for each in (self, earlier))
        if here != there:
            raise ValueError(f"The results are of {there}, and this is {here}: write to another folder.")
        self.started -= earlier.seconds
        self.loads = [*earlier.loads, *self.loads]


def processor() -> str:
    """Return the processor's name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def to_json(circumstances: Circumstances, results: Results) -> str:
    """Return everything, each single turn with it."""
    told = {
        "circumstances": dataclasses.asdict(circumstances),
        "versions": results.versions,
        "failures": results.failures,
        "comparisons": [
            dataclasses.asdict(each)
            | {
                "epochs": epochs_of(each.workload),
                "ratio": {clock: dataclasses.asdict(each.ratio(clock)) for clock in ("cpu", "wall")},
                "quiet ratio": None if (quiet := each.quiet_ratio()) is None else dataclasses.asdict(quiet),
                "microseconds": {clock: each.microseconds(clock) for clock in ("cpu", "wall")},
            }
            for each in results.comparisons.values()
        ],
        "beginnings": [dataclasses.asdict(each) for each in results.beginnings.values()],
    }
    return json.dumps(told, indent=1) + "\n"


def from_json(text: str) -> tuple[Circumstances, Results]:
    """Return what `to_json` was given, but for the failures: what failed may be tried again.

    Raises:
        ValueError: A workload has another length by now, so that its turns cannot be put together with new ones.
    """
    told = json.loads(text)
    results = Results(versions=told["versions"])
    for each in told["comparisons"]:
        if each["epochs"] != epochs_of(each["workload"]):
            raise ValueError(f"The turns of {each['workload']} had other lengths: write to another folder.")
        pairs = [(turn_of(plain), turn_of(theirs)) for plain, theirs in each["pairs"]]
        comparison = Comparison(each["workload"], each["contender"], each["difference"], pairs)
        results.comparisons[comparison.workload, comparison.contender] = comparison
    results.beginnings = {
        each["contender"]: Beginning(each["contender"], each["samples"]) for each in told["beginnings"]
    }
    return Circumstances(**told["circumstances"]), results


def epochs_of(workload: str) -> list[int]:
    """Return the epochs of the two runs of a turn."""
    return [WORKLOADS[workload].short, WORKLOADS[workload].long]


def turn_of(told: dict[str, dict[str, float]]) -> Turn:
    return Turn(Taken(**told["short"]), Taken(**told["long"]))


def tables(circumstances: Circumstances, results: Results) -> str:
    """Return all tables, each under a line that says what it is."""
    parts = [conditions(circumstances, results), goals(results), *map(str, beside_peers(results)), begin_table(results)]
    parts.append(begin_goals(results))
    if results.failures:
        parts.append("Not measured:\n\n" + "\n".join(f"- {name}: {why}" for name, why in results.failures.items()))
    return "\n\n".join(part for part in parts if part) + "\n"


def conditions(circumstances: Circumstances, results: Results) -> str:
    """Say where it was measured, and what."""
    loads = f"{min(circumstances.loads):.1f} to {max(circumstances.loads):.1f}"
    versions = ", ".join(f"{CONTENDERS[name].title} {version}" for name, version in results.versions.items())
    pairs = sorted({len(each.pairs) for each in results.comparisons.values()})
    told = f"{' to '.join(map(str, dict.fromkeys((pairs[0], pairs[-1]))))} pairs; " if pairs else ""
    machine = f"{circumstances.machine}, {circumstances.cores} cores"
    return (
        f"{told}{machine}, one thread a process, Python {circumstances.python}; "
        f"{circumstances.seconds / 60:.0f} minutes, the load of the machine {loads}. {versions}."
    )


def goals(results: Results) -> str:
    """Return ptacc's own table: each workload with its goal."""
    rows = [
        (
            WORKLOADS[each.workload].title,
            *times(each),
            shown(each.ratio("cpu")),
            shown(each.ratio("wall")),
            shown(each.quiet_ratio()),
            goal_of(each),
            sameness(each),
        )
        for name in WORKLOADS
        if (each := results.comparisons.get((name, "ptacc"))) is not None
    ]
    head = ("ptacc", "plain, us", "ptacc, us", "ratio (CPU)", "ratio (clock)", "quiet steps", "goal", "weights or loss")
    return table(head, rows)


def beside_peers(results: Results) -> Iterable[str]:
    """Yield a table for each workload that a peer took on, the fastest first."""
    for workload in WORKLOADS.values():
        found = [each for each in results.comparisons.values() if each.workload == workload.name]
        if any(each.contender != "ptacc" for each in found):
            yield table(
                (
                    workload.title,
                    "us",
                    "ratio (CPU)",
                    "ratio (clock)",
                    "quiet steps",
                    "loss" if workload.evaluates else "weights",
                ),
                [
                    (
                        CONTENDERS[each.contender].title,
                        times(each)[1],
                        shown(each.ratio("cpu")),
                        shown(each.ratio("wall")),
                        shown(each.quiet_ratio()),
                        sameness(each),
                    )
                    for each in sorted(found, key=lambda each: each.ratio("cpu").median)
                ],
            )


def begin_table(results: Results) -> str:
    """Return the table of imports, first steps and memory."""
    rows: list[tuple[str, ...]] = []
    for name, beginning in results.beginnings.items():
        packages = CONTENDERS[name].packages
        rows.append(
            (
                CONTENDERS[name].title,
                f"{beginning.of('import', 'cpu').median:.2f}" if packages else "",
                f"{beginning.of('import', 'wall').median:.2f}" if packages else "",
                f"{beginning.of('first step', 'cpu').median:.2f}",
                f"{beginning.of('first step', 'wall').median:.2f}",
                f"{beginning.of('memory', 'of training').median:.0f}",
                f"{beginning.of('memory', 'peak').median:.0f}",
            )
        )
    head = ("", "import, s CPU", "s", "first step, s CPU", "s", "peak of training, MiB", "of the process, MiB")
    return table(head, rows)


def begin_goals(results: Results) -> str:
    """Say whether ptacc's import and its memory reach their goals."""
    if not {PLAIN, "ptacc"} <= results.beginnings.keys():
        return ""
    plain, ours = results.beginnings[PLAIN], results.beginnings["ptacc"]
    seconds = ours.of("import", "wall").median
    parts = [
        f"Importing ptacc takes {seconds:.2f} s, at most {IMPORT_GOAL}: {verdict(reached=seconds <= IMPORT_GOAL)}.",
    ]
    for part, what in (("of training", "The peak of training"), ("peak", "The peak of the process")):
        ratio = ours.of("memory", part).median / plain.of("memory", part).median
        told = verdict(reached=ratio <= MEMORY_GOAL)
        parts.append(f"{what} is {ratio:.3f} of the plain loop's, at most {MEMORY_GOAL}: {told}.")
    return " ".join(parts)


def verdict(*, reached: bool) -> str:
    return "reached" if reached else "missed"


def goal_of(comparison: Comparison) -> str:
    """Say what the goal is, and whether it was reached."""
    workload = WORKLOADS[comparison.workload]
    if workload.goal is None:
        return ""
    told = verdict(reached=reaches(workload, comparison.ratio("cpu")))
    what = "" if workload.goal_is_for == "median" else "upper end "
    return f"{what}{workload.goal:.2f}: {told}"


def reaches(workload: Workload, ratio: Estimate) -> bool:
    """Say whether a ratio reaches the workload's goal."""
    assert workload.goal is not None
    return ratio.median <= workload.goal if workload.goal_is_for == "median" else ratio.high < workload.goal


def sameness(comparison: Comparison) -> str:
    """Say how far the weights are from the plain loop's after the same run, or the loss in an evaluation."""
    return "equal" if comparison.difference == 0 else f"within {comparison.difference:.0e}"


def times(comparison: Comparison) -> tuple[str, str]:
    plain, theirs = comparison.microseconds("cpu")
    return f"{plain:.0f}", f"{theirs:.0f}"


def shown(ratio: Estimate | None) -> str:
    return "" if ratio is None else f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, nothing where it has no rows."""
    if not rows:
        return ""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
