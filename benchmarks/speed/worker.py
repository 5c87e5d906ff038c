"""Run one contender in its own process: read requests from standard input, run the workloads, and report the times.

Each request and each answer is a line of JSON. With `--startup` there are no requests. The only answer is the startup
cost of the fresh process.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import multiprocessing
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
    from benchmarks.speed.workloads import Workload

MEBIBYTE = 2**20


def read_clocks() -> tuple[float, float]:
    """Return the CPU time of all threads of this process, and the time."""
    return time.process_time(), time.time()


def elapsed_since(start: tuple[float, float]) -> dict[str, float]:
    return {name: now - then for name, now, then in zip(("cpu", "wall"), read_clocks(), start, strict=True)}


def serve(name: str, answers: TextIO) -> None:
    """Answer requests until standard input is closed."""
    import torch

    from benchmarks.speed.contenders import CONTENDERS
    from benchmarks.speed.workloads import WORKLOADS

    torch.set_num_threads(1)
    entry = CONTENDERS[name]
    try:
        contender = entry.load()
    except ImportError as error:
        send(answers, missing=str(error))
        return
    send(answers, runs=list(contender.RUNS), version=version(entry.distribution))
    for line in sys.stdin:
        request = json.loads(line)
        workload = WORKLOADS[request["workload"]]
        try:
            send(answers, **measure(contender.RUNS[workload.run], workload, request))
        except Exception as error:  # noqa: BLE001 - a contender that fails in one workload may succeed in others
            send(answers, error=f"{type(error).__name__}: {error}")


def measure(run: Run, workload: Workload, request: Mapping[str, Any]) -> dict[str, float]:
    """Run a workload once, return its time, and save its weights if the request names a file."""
    import numpy as np

    gc.collect()
    gc.freeze()  # later collections skip the imported modules, which take longer than a short run
    with tempfile.TemporaryDirectory(dir=request["folder"]) as folder:
        job = workload.make_job(request["epochs"], Path(folder))
        parameters = list(job.model.parameters())
        step_ends: list[int] = []
        job.optimizer.register_step_post_hook(lambda *_: step_ends.append(time.perf_counter_ns()))
        children, start = read_cpu_of_children(), read_clocks()
        loss = run(job)
        times = elapsed_since(start)
    del job
    if workload.workers:
        end_workers()
        times["cpu"] += read_cpu_of_children() - children
    if request["weights"] is not None and os.environ.get("RANK", "0") == "0":
        np.save(request["weights"], np.concatenate([each.detach().numpy().ravel() for each in parameters]))
    return times | {"loss": loss, "steps": len(step_ends), "quiet_step": compute_quiet_step(step_ends)}


def end_workers() -> None:
    """End the workers of loaders that are no longer used.

    Raises:
        RuntimeError: Some are still in use, so that their CPU time is not known.
    """
    gc.collect()
    if running := multiprocessing.active_children():
        raise RuntimeError(f"{len(running)} workers run after the end of the run")


def read_cpu_of_children() -> float:
    """Return the CPU time of the child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def compute_quiet_step(step_ends: list[int]) -> float:
    """Return the seconds between two steps at the tenth percentile, or 0 if there are fewer than 20 steps.

    Other processes interrupt some of the steps but not most of them, so this figure excludes their load.
    """
    durations = sorted(later - earlier for earlier, later in itertools.pairwise(step_ends))
    return durations[len(durations) // 10] / 1e9 if len(durations) >= 20 else 0.0


def report_startup(name: str, started: float, answers: TextIO) -> None:
    """Report the time to import the contender's packages, the time to the first step, and the memory of training."""
    import torch

    torch.set_num_threads(1)
    from benchmarks.speed.contenders import CONTENDERS
    from benchmarks.speed.workloads import FIRST_STEP, MEMORY

    entry = CONTENDERS[name]
    answer: dict[str, Any] = {}
    try:
        for package in entry.packages[:-1]:
            import_module(package)
        start = read_clocks()
        for package in entry.packages[-1:]:
            import_module(package)
        answer["import"] = elapsed_since(start)
        train = entry.load().RUNS["train"]
    except ImportError as error:
        send(answers, missing=str(error))
        return
    with tempfile.TemporaryDirectory() as folder:
        train(FIRST_STEP.make_job(1, Path(folder)))
        answer["first step"] = elapsed_since((0.0, started))
        job = MEMORY.make_job(MEMORY.long, Path(folder))
        gc.collect()
        before = read_memory()
        train(job)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    send(answers, **answer, memory={"peak": peak, "of training": peak - before})


def read_memory() -> float:
    """Return the resident memory of this process in MiB."""
    import psutil

    return float(psutil.Process().memory_info().rss) / MEBIBYTE


def send(answers: TextIO, **answer: object) -> None:
    print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", help="the name of the contender")
    parser.add_argument("--startup", action="store_true", help="report the startup cost and exit")
    parser.add_argument("--started", type=float, default=time.time(), help="start time of this process")
    args = parser.parse_args()

    warnings.simplefilter("ignore")  # several contenders cause deprecation warnings in torch
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep the output of contenders out of the answers
    if args.startup:
        report_startup(args.contender, args.started, answers)
    else:
        serve(args.contender, answers)
    answers.flush()
    # Threads of gloo that still free a tensor would abort the interpreter during shutdown.
    os._exit(0)


if __name__ == "__main__":
    main()
