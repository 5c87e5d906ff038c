"""The results as JSON and as Markdown tables."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.speed.contenders import CONTENDERS, PLAIN
from benchmarks.speed.measuring import Comparison, Results, Startup, Turn
from benchmarks.speed.processes import Timing
from benchmarks.speed.ratios import Estimate
from benchmarks.speed.workloads import WORKLOADS, Workload

IMPORT_GOAL = 0.3
"""Maximum seconds in addition to torch and Accelerate."""
MEMORY_GOAL = 1.02
"""Maximum ratio to the plain loop."""


@dataclass
class Conditions:
    """The machine, and the time and load of the measurements.

    Args:
        machine: The processor.
        cores: The number of cores that this process may use.
        python: The version of Python.
        started: The start on the monotonic clock.
        loads: The load of the machine at the start and after each write.
        seconds: The duration so far, including earlier runs.
    """

    machine: str
    cores: int
    python: str
    started: float
    loads: list[float]
    seconds: float = 0.0

    @classmethod
    def current(cls) -> Conditions:
        """Return the current conditions."""
        cores = len(os.sched_getaffinity(0))
        return cls(read_processor_name(), cores, platform.python_version(), time.monotonic(), [os.getloadavg()[0]])

    def update(self) -> None:
        """Store the current load and duration."""
        self.loads.append(os.getloadavg()[0])
        self.seconds = time.monotonic() - self.started

    def add_earlier(self, earlier: Conditions) -> None:
        """Add the duration and loads of an earlier run.

        Raises:
            ValueError: The earlier run was on another machine.
        """
        here, there = ((each.machine, each.cores, each.python) for each in (self, earlier))
        if here != there:
            raise ValueError(f"The results are of {there}, and this is {here}: write to another folder.")
        self.started -= earlier.seconds
        self.loads = [*earlier.loads, *self.loads]


def read_processor_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


# ---- JSON


def to_json(conditions: Conditions, results: Results) -> str:
    """Return all results, including each turn. A turn is the fields of two timings."""
    data = {
        "conditions": dataclasses.asdict(conditions),
        "versions": results.versions,
        "failures": results.failures,
        "comparisons": [
            dataclasses.asdict(each)
            | {
                "pairs": [[dataclasses.astuple(turn) for turn in pair] for pair in each.pairs],
                "epochs": run_epochs(each.workload),
                "ratio": {clock: dataclasses.asdict(each.ratio(clock)) for clock in ("cpu", "wall")},
                "quiet ratio": None if (quiet := each.quiet_ratio()) is None else dataclasses.asdict(quiet),
                "microseconds": {clock: each.microseconds(clock) for clock in ("cpu", "wall")},
            }
            for each in results.comparisons.values()
        ],
        "startups": [dataclasses.asdict(each) for each in results.startups.values()],
    }
    return json.dumps(data, separators=(",", ":")) + "\n"


def from_json(text: str) -> tuple[Conditions, Results]:
    """Return the arguments of `to_json`, except for the failures, which may be measured again.

    Raises:
        ValueError: The length of a workload has changed, so its turns cannot be combined with new ones.
    """
    data = json.loads(text)
    results = Results(versions=data["versions"])
    for each in data["comparisons"]:
        if each["epochs"] != run_epochs(each["workload"]):
            raise ValueError(f"The turns of {each['workload']} have other lengths: write to another folder.")
        pairs = [(parse_turn(plain), parse_turn(contender)) for plain, contender in each["pairs"]]
        comparison = Comparison(each["workload"], each["contender"], each["difference"], pairs)
        results.comparisons[comparison.workload, comparison.contender] = comparison
    results.startups = {each["contender"]: Startup(each["contender"], each["samples"]) for each in data["startups"]}
    return Conditions(**data["conditions"]), results


def run_epochs(workload: str) -> list[int]:
    """Return the epochs of the two runs of a turn."""
    return [WORKLOADS[workload].short, WORKLOADS[workload].long]


def parse_turn(data: Sequence[Sequence[Any]]) -> Turn:
    short, long = data
    return Turn(Timing(*short), Timing(*long))


# ---- tables


def format_report(conditions: Conditions, results: Results) -> str:
    """Return all tables."""
    parts = [
        format_conditions(conditions, results),
        format_goals(results),
        *format_comparisons(results),
        format_startups(results),
        format_startup_goals(results),
    ]
    if results.failures:
        parts.append("Not measured:\n\n" + "\n".join(f"- {name}: {why}" for name, why in results.failures.items()))
    return "\n\n".join(part for part in parts if part) + "\n"


def format_conditions(conditions: Conditions, results: Results) -> str:
    """Return a line with the number of pairs, the machine, the load and the versions."""
    loads = f"{min(conditions.loads):.1f} to {max(conditions.loads):.1f}"
    versions = ", ".join(f"{CONTENDERS[name].title} {version}" for name, version in results.versions.items())
    pairs = sorted({len(each.pairs) for each in results.comparisons.values()})
    count = f"{' to '.join(map(str, dict.fromkeys((pairs[0], pairs[-1]))))} pairs; " if pairs else ""
    machine = f"{conditions.machine}, {conditions.cores} cores"
    return (
        f"{count}{machine}, one thread per process, Python {conditions.python}; "
        f"{conditions.seconds / 60:.0f} minutes, load of the machine {loads}. {versions}."
    )


def format_goals(results: Results) -> str:
    """Return the table of ptacc: each workload with its goal."""
    rows = [
        (
            WORKLOADS[each.workload].title,
            *format_times(each),
            format_ratio(each.ratio("cpu")),
            format_ratio(each.ratio("wall")),
            format_ratio(each.quiet_ratio()),
            format_goal(each),
            format_difference(each),
        )
        for name in WORKLOADS
        if (each := results.comparisons.get((name, "ptacc"))) is not None
    ]
    head = ("ptacc", "plain, us", "ptacc, us", "ratio (CPU)", "ratio (clock)", "quiet steps", "goal", "weights or loss")
    return format_table(head, rows)


def format_comparisons(results: Results) -> Iterator[str]:
    """Yield a table for each workload with several contenders, the fastest first."""
    for workload in WORKLOADS.values():
        comparisons = [each for each in results.comparisons.values() if each.workload == workload.name]
        if any(each.contender != "ptacc" for each in comparisons):
            last = "loss" if workload.evaluates else "weights"
            yield format_table(
                (workload.title, "us", "ratio (CPU)", "ratio (clock)", "quiet steps", last),
                [
                    (
                        CONTENDERS[each.contender].title,
                        format_times(each)[1],
                        format_ratio(each.ratio("cpu")),
                        format_ratio(each.ratio("wall")),
                        format_ratio(each.quiet_ratio()),
                        format_difference(each),
                    )
                    for each in sorted(comparisons, key=lambda each: each.ratio("cpu").median)
                ],
            )


def format_startups(results: Results) -> str:
    """Return the table of imports, first steps and memory."""
    rows: list[tuple[str, ...]] = []
    for name, startup in results.startups.items():
        packages = CONTENDERS[name].packages
        rows.append(
            (
                CONTENDERS[name].title,
                f"{startup.estimate('import', 'cpu').median:.2f}" if packages else "",
                f"{startup.estimate('import', 'wall').median:.2f}" if packages else "",
                f"{startup.estimate('first step', 'cpu').median:.2f}",
                f"{startup.estimate('first step', 'wall').median:.2f}",
                f"{startup.estimate('memory', 'of training').median:.0f}",
                f"{startup.estimate('memory', 'peak').median:.0f}",
            )
        )
    head = (
        "",
        "import, s CPU",
        "import, s",
        "first step, s CPU",
        "first step, s",
        "peak of training, MiB",
        "peak of the process, MiB",
    )
    return format_table(head, rows)


def format_startup_goals(results: Results) -> str:
    """Return whether the import time and the memory of ptacc reach their goals."""
    if not {PLAIN, "ptacc"} <= results.startups.keys():
        return ""
    plain, ptacc = results.startups[PLAIN], results.startups["ptacc"]
    seconds = ptacc.estimate("import", "wall").median
    parts = [
        f"Importing ptacc takes {seconds:.2f} s; goal {IMPORT_GOAL}: {format_verdict(seconds <= IMPORT_GOAL)}.",
    ]
    for part, name in (("of training", "peak of training"), ("peak", "peak of the process")):
        ratio = ptacc.estimate("memory", part).median / plain.estimate("memory", part).median
        verdict = format_verdict(ratio <= MEMORY_GOAL)
        parts.append(f"The {name} is {ratio:.3f} of the plain loop's; goal {MEMORY_GOAL}: {verdict}.")
    return " ".join(parts)


def format_verdict(is_reached: bool) -> str:
    return "reached" if is_reached else "missed"


def format_goal(comparison: Comparison) -> str:
    """Return the goals and whether they were reached."""
    workload, quiet = WORKLOADS[comparison.workload], comparison.quiet_ratio()
    parts = []
    if workload.goal is not None:
        verdict = format_verdict(is_goal_reached(workload, comparison.ratio("cpu")))
        statistic = "" if workload.goal_statistic == "median" else "upper end "
        parts.append(f"{statistic}{workload.goal:.2f}: {verdict}")
    if workload.quiet_goal is not None and quiet is not None:
        parts.append(f"quiet steps {workload.quiet_goal:.2f}: {format_verdict(quiet.median <= workload.quiet_goal)}")
    return ", ".join(parts)


def is_goal_reached(workload: Workload, ratio: Estimate) -> bool:
    assert workload.goal is not None
    return ratio.median <= workload.goal if workload.goal_statistic == "median" else ratio.high < workload.goal


def format_difference(comparison: Comparison) -> str:
    """Return the difference to the plain loop's weights, or to its loss in an evaluation."""
    return "equal" if comparison.difference == 0 else f"within {comparison.difference:.0e}"


def format_times(comparison: Comparison) -> tuple[str, str]:
    plain, contender = comparison.microseconds("cpu")
    return f"{plain:.0f}", f"{contender:.0f}"


def format_ratio(ratio: Estimate | None) -> str:
    return "" if ratio is None else f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, or an empty string if it has no rows."""
    if not rows:
        return ""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
