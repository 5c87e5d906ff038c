"""One contender in a process of its own: it does what the lines on its standard input ask for, and times it.

A request is a line of JSON, and so is its answer. With `--cold` there are no requests: the one answer is what it costs
to begin, in a process that did nothing before.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from benchmarks.speed.jobs import Run

MEBIBYTE = 2**20


def clocks() -> tuple[float, float]:
    """Return the CPU time of this process, all its threads together, and the time."""
    return time.process_time(), time.time()


def since(start: tuple[float, float]) -> dict[str, float]:
    return {name: now - then for name, now, then in zip(("cpu", "wall"), clocks(), start, strict=True)}


def serve(name: str, answers: TextIO) -> None:
    """Answer requests until there are no more."""
    import torch

    from benchmarks.speed.contenders import CONTENDERS

    torch.set_num_threads(1)
    entry = CONTENDERS[name]
    try:
        contender = entry.load()
    except ImportError as error:
        say(answers, absent=str(error))
        return
    say(answers, workloads=list(contender.RUNS), version=version(entry.distribution))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            say(answers, **measure(contender.RUNS[request["workload"]], request))
        except Exception as error:  # noqa: BLE001 - a contender that cannot do one workload may do the others
            say(answers, error=f"{type(error).__name__}: {error}")


def measure(run: Run, request: Mapping[str, Any]) -> dict[str, float]:
    """Do a workload once, and return the time of it; its weights go to a file where one is named."""
    import numpy as np

    from benchmarks.speed.workloads import WORKLOADS

    with tempfile.TemporaryDirectory(dir=request["folder"]) as folder:
        job = WORKLOADS[request["workload"]].make_job(request["epochs"], Path(folder))
        ends: list[int] = []
        job.optimizer.register_step_post_hook(lambda *_: ends.append(time.perf_counter_ns()))
        gc.collect()
        start = clocks()
        loss = run(job)
        taken = since(start)
    if request["weights"] is not None and os.environ.get("RANK", "0") == "0":
        weights = [parameter.detach().numpy().ravel() for parameter in job.model.parameters()]
        np.save(request["weights"], np.concatenate(weights))
    return taken | {"loss": loss, "quiet_step": quiet(ends)}


def quiet(ends: list[int]) -> float:
    """Return the seconds from one step's end to the next in the quickest tenth of the steps, 0 where there are few.

    Other processes come between two steps now and then, and not between most: their load is not in this figure.
    """
    taken = sorted(later - earlier for earlier, later in itertools.pairwise(ends))
    return taken[len(taken) // 10] / 1e9 if len(taken) >= 20 else 0.0


def begin(name: str, started: float, answers: TextIO) -> None:
    """Tell what it costs to import the contender's packages, to come to a first step, and what memory it takes."""
    import torch

    torch.set_num_threads(1)
    from benchmarks.speed.contenders import CONTENDERS
    from benchmarks.speed.workloads import FIRST_STEP, MEMORY

    entry = CONTENDERS[name]
    told: dict[str, Any] = {}
    try:
        for package in entry.packages[:-1]:
            import_module(package)
        start = clocks()
        for package in entry.packages[-1:]:
            import_module(package)
        told["import"] = since(start)
        train = entry.load().RUNS["step"]
    except ImportError as error:
        say(answers, absent=str(error))
        return
    with tempfile.TemporaryDirectory() as folder:
        train(FIRST_STEP.make_job(1, Path(folder)))
        told["first step"] = since((0.0, started))
        job = MEMORY.make_job(MEMORY.long, Path(folder))
        gc.collect()
        before = memory_now()
        train(job)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    say(answers, **told, memory={"peak": peak, "of training": peak - before})


def memory_now() -> float:
    """Return the memory that this process has now, in MiB."""
    import psutil

    return float(psutil.Process().memory_info().rss) / MEBIBYTE


def say(answers: TextIO, **answer: object) -> None:
    print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender")
    parser.add_argument("--cold", action="store_true", help="tell what it costs to begin, and end")
    parser.add_argument("--started", type=float, default=time.time(), help="when this process was started")
    asked = parser.parse_args()

    warnings.simplefilter("ignore")  # several peers warn of what torch will do some day
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what contenders print is no answer
    if asked.cold:
        begin(asked.contender, asked.started, answers)
    else:
        serve(asked.contender, answers)
    answers.flush()
    # Threads of gloo that still free a tensor would abort an interpreter that shuts down.
    os._exit(0)


if __name__ == "__main__":
    main()
