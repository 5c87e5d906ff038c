"""Compare contenders with the plain loop, and write the results as JSON, as tables and as a chart.

All measurements take half an hour or more. To measure a part, name it. `--add` adds it to the results in the folder:

    python -m benchmarks.speed --workload step convnet --contender ptacc lightning --pairs 20
    python -m benchmarks.speed --workload gpt --contender ptacc --add
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed.chart import draw
from benchmarks.speed.contenders import CONTENDERS, PLAIN
from benchmarks.speed.measuring import Results, compare, measure_startup
from benchmarks.speed.report import Conditions, format_report, from_json, to_json
from benchmarks.speed.workloads import WORKLOADS

STARTUP = "startup"
"""The workload name for the measurement of import, first step and memory."""
RESULTS = "results.json"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workloads, contenders = [*WORKLOADS, STARTUP], [name for name in CONTENDERS if name != PLAIN]
    parser.add_argument(
        "--workload", nargs="+", choices=workloads, default=workloads, metavar="NAME", help=", ".join(workloads)
    )
    parser.add_argument(
        "--contender", nargs="+", choices=contenders, default=contenders, metavar="NAME", help=", ".join(contenders)
    )
    parser.add_argument("--pairs", type=int, default=20, help="pairs of turns per workload")
    parser.add_argument("--launches", type=int, default=4, help="restarts of the processes, over which pairs are split")
    parser.add_argument("--startups", type=int, default=3, help="fresh processes for import, first step and memory")
    parser.add_argument("--add", action="store_true", help="add to the results in the folder")
    parser.add_argument("--out", type=Path, default=Path("runs/speed"), help="folder for the results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    conditions, results = Conditions.current(), Results()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.add:
        earlier, results = from_json((args.out / RESULTS).read_text(encoding="utf-8"))
        conditions.add_earlier(earlier)
    with tempfile.TemporaryDirectory() as folder:
        # The pairs of a contender are spread over time, so that a busy minute of the machine affects all contenders.
        for launch in range(args.launches):
            share = len(range(launch, args.pairs, args.launches))
            for couple in couples([name for name in args.contender if share and name not in results.failures]):
                print(f"{conditions.seconds:6.0f} s  launch {launch + 1}: {' and '.join(couple)}", flush=True)
                compare(couple, [name for name in args.workload if name != STARTUP], share, Path(folder), results)
                write(conditions, results, args.out)
    for _ in range(args.startups if STARTUP in args.workload else 0):
        for contender in (PLAIN, *args.contender):
            if contender not in results.failures:
                measure_startup(contender, results)
    print(write(conditions, results, args.out))


def write(conditions: Conditions, results: Results, folder: Path) -> str:
    """Write the results so far, and return the tables."""
    conditions.update()
    text = format_report(conditions, results)
    (folder / RESULTS).write_text(to_json(conditions, results), encoding="utf-8")
    (folder / "tables.txt").write_text(text, encoding="utf-8")
    draw(results, folder)
    return text


def couples(contenders: Sequence[str]) -> Sequence[Sequence[str]]:
    """Return the contenders that are measured together: in twos, which share the turns of the plain loop."""
    return [contenders[start : start + 2] for start in range(0, len(contenders), 2)]


if __name__ == "__main__":
    main()
