"""Measure contenders beside the plain loop, and write what came out as JSON, as tables and as a chart.

All of it takes one to two hours, as the machine is. A part of it is asked for by name, and `--add` has another part
added to what is in the folder:

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
from benchmarks.speed.measuring import Results, begin_afresh, compare
from benchmarks.speed.processes import WorkerError
from benchmarks.speed.report import Circumstances, from_json, tables, to_json
from benchmarks.speed.workloads import WORKLOADS

BEGIN = "begin"
"""The name under which import, first step and memory are asked for."""
RESULTS = "results.json"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names, everyone = [*WORKLOADS, BEGIN], [name for name in CONTENDERS if name != PLAIN]
    parser.add_argument("--workload", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--contender", nargs="+", choices=everyone, default=everyone, metavar="NAME", help=", ".join(everyone)
    )
    parser.add_argument("--pairs", type=int, default=20, help="pairs of turns in each workload")
    parser.add_argument("--launches", type=int, default=4, help="fresh processes that share the pairs")
    parser.add_argument("--beginnings", type=int, default=3, help="fresh processes for import, first step and memory")
    parser.add_argument("--add", action="store_true", help="add to the results that are in the folder")
    parser.add_argument("--out", type=Path, default=Path("runs/speed"), help="folder for what comes out")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    asked = parse(arguments)
    circumstances, results = Circumstances.now(), Results()
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.add:
        earlier, results = from_json((asked.out / RESULTS).read_text(encoding="utf-8"))
        circumstances.go_on_from(earlier)
    with tempfile.TemporaryDirectory() as folder:
        # Everybody's turn comes several times, far apart: a slow minute of the machine is not one contender's.
        for launch in range(asked.launches):
            share = len(range(launch, asked.pairs, asked.launches))
            for contender in asked.contender:
                print(f"{circumstances.seconds:6.0f} s  launch {launch + 1}: {contender}", flush=True)
                measure(contender, [name for name in asked.workload if name != BEGIN], share, Path(folder), results)
                write(circumstances, results, asked.out)
    for _ in range(asked.beginnings if BEGIN in asked.workload else 0):
        for contender in (PLAIN, *asked.contender):
            if contender not in results.failures:
                begin_afresh(contender, results)
    print(write(circumstances, results, asked.out))


def write(circumstances: Circumstances, results: Results, folder: Path) -> str:
    """Write what is known so far, and return the tables."""
    circumstances.look()
    text = tables(circumstances, results)
    (folder / RESULTS).write_text(to_json(circumstances, results), encoding="utf-8")
    (folder / "tables.txt").write_text(text, encoding="utf-8")
    draw(results, folder)
    return text


def measure(contender: str, names: Sequence[str], pairs: int, folder: Path, results: Results) -> None:
    """Compare a contender, or note why it cannot be."""
    if not pairs or contender in results.failures:
        return
    try:
        compare(contender, names, pairs, folder, results)
    except WorkerError as error:
        results.failures[contender] = str(error)


if __name__ == "__main__":
    main()
