"""The processes that run the contenders, seen from the measuring process."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

ROOT = Path(__file__).parents[2]
TIMEOUT = 300.0
"""Seconds to wait for an answer."""
MODULE = "benchmarks.speed.worker"


class WorkerError(Exception):
    """A contender is not installed, failed, or did not answer."""


@dataclass(frozen=True)
class Timing:
    """The time of one run of a workload.

    Args:
        cpu: Seconds of CPU time, over all threads and processes.
        wall: Seconds of elapsed time.
        loss: The mean loss that the contender reports.
        steps: The number of optimizer steps.
        quiet_step: Seconds of a step without interruption, or 0 if there are few or no steps.
    """

    cpu: float
    wall: float
    loss: float
    steps: int = 0
    quiet_step: float = 0.0


class Worker:
    """The processes of one contender. Several processes share each step."""

    def __init__(self, contender: str, folder: Path, *, processes: int = 1) -> None:
        """Start the processes. The block of a `with` statement ends them."""
        self.contender, self._folder = contender, folder
        self.runs: Sequence[str] = ()
        self.version = ""
        self._errors = tempfile.TemporaryFile("w+", dir=folder)  # noqa: SIM115 - closed by `end`
        command = [sys.executable, "-m", MODULE, contender]
        port = find_free_port()
        self._ranks = [
            start(command, make_environment(rank, processes, port), self._errors, stdin=subprocess.PIPE)
            for rank in range(processes)
        ]

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def wait_until_ready(self) -> None:
        """Wait until the processes have imported the contender.

        Raises:
            WorkerError: The contender's library is not installed.
        """
        first, *_ = [self._read_answer(rank) for rank in self._ranks]
        self.runs, self.version = first["runs"], first["version"]

    def run(self, workload: str, epochs: int, weights: Path | None = None) -> Timing:
        """Run a workload once.

        Args:
            workload: The name of the workload.
            epochs: The number of epochs.
            weights: The file for the final weights.

        Raises:
            WorkerError: The contender failed.
        """
        weights_path = None if weights is None else str(weights)
        request = {"workload": workload, "epochs": epochs, "weights": weights_path, "folder": str(self._folder)}
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps(request) + "\n")
            rank.stdin.flush()
        answers = [self._read_answer(rank) for rank in self._ranks]
        cpu, wall = sum(answer["cpu"] for answer in answers), max(answer["wall"] for answer in answers)
        first = answers[0]
        return Timing(round(cpu, 6), round(wall, 6), round(first["loss"], 8), first["steps"], first["quiet_step"])

    def end(self) -> None:
        """End the processes."""
        for rank in self._ranks:
            rank.kill()
            rank.wait()
            for pipe in (rank.stdin, rank.stdout):
                if pipe is not None:
                    pipe.close()
        self._errors.close()

    def _read_answer(self, rank: subprocess.Popen[str]) -> dict[str, Any]:
        assert rank.stdout is not None
        ready, _, _ = select.select([rank.stdout], [], [], TIMEOUT)
        line = rank.stdout.readline() if ready else ""
        return parse_answer(self.contender, line, self._errors)


def run_startup(contender: str) -> dict[str, dict[str, float]]:
    """Return the startup cost of a contender in a fresh process.

    Raises:
        WorkerError: The contender is not installed or failed.
    """
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", MODULE, contender, "--startup", "--started", str(time.time())]
        process = start(command, make_environment(0, 1, 0), errors, stdin=subprocess.DEVNULL)
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        return parse_answer(contender, output, errors)


def parse_answer(contender: str, line: str, errors: IO[str]) -> dict[str, Any]:
    """Parse the answer of a worker.

    Raises:
        WorkerError: The answer is missing or reports a failure.
    """
    if not line:
        errors.seek(0)
        raise WorkerError(f"{contender} did not answer: {errors.read()[-2000:].strip()}")
    answer: dict[str, Any] = json.loads(line)
    for failure in ("missing", "error"):
        if failure in answer:
            raise WorkerError(f"{contender}: {answer[failure]}")
    return answer


def start(command: Sequence[str], variables: dict[str, str], errors: IO[str], *, stdin: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=ROOT, env=variables, stdin=stdin, stdout=subprocess.PIPE, stderr=errors, text=True
    )


def make_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """Return the environment of a process: one thread, CPU only, no network, and a launcher's variables if needed."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if processes > 1:
        variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        variables |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return variables


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
