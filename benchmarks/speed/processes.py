"""The processes that contenders run in, as the measuring process sees them."""

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
PATIENCE = 300.0
"""Seconds to wait for an answer."""
MODULE = "benchmarks.speed.worker"


class WorkerError(Exception):
    """A contender is absent, failed, or did not answer."""


@dataclass(frozen=True)
class Taken:
    """The time that a workload took once.

    Args:
        cpu: Seconds of CPU, all threads and processes together.
        wall: Seconds on the clock.
        loss: The mean loss that the contender told.
        quiet_step: Seconds of a step that nothing else came between; 0 where there are no steps, or few.
    """

    cpu: float
    wall: float
    loss: float
    quiet_step: float = 0.0


class Worker:
    """The processes of one contender, which take turns with those of another: several where they share their steps."""

    def __init__(self, contender: str, folder: Path, *, processes: int = 1) -> None:
        """Start them, and wait until they are ready.

        Raises:
            WorkerError: The contender's library is not installed.
        """
        self.contender, self._folder = contender, folder
        self._errors = tempfile.TemporaryFile("w+", dir=folder)  # noqa: SIM115 - closed by `end`
        command = [sys.executable, "-m", MODULE, contender]
        port = free_port()
        self._ranks = [
            start(command, environment(rank, processes, port), self._errors, stdin=subprocess.PIPE)
            for rank in range(processes)
        ]
        try:
            first, *_ = [self._answer(rank) for rank in self._ranks]
        except WorkerError:
            self.end()
            raise
        self.workloads: Sequence[str] = first["workloads"]
        self.version: str = first["version"]

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def do(self, workload: str, epochs: int, weights: Path | None = None) -> Taken:
        """Do a workload once.

        Args:
            workload: Its name.
            epochs: How much of it.
            weights: Where to leave the weights that come of it.

        Raises:
            WorkerError: The contender failed.
        """
        named = None if weights is None else str(weights)
        request = {"workload": workload, "epochs": epochs, "weights": named, "folder": str(self._folder)}
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps(request) + "\n")
            rank.stdin.flush()
        told = [self._answer(rank) for rank in self._ranks]
        cpu, wall = sum(each["cpu"] for each in told), max(each["wall"] for each in told)
        return Taken(cpu, wall, told[0]["loss"], told[0]["quiet_step"])

    def end(self) -> None:
        """End the processes."""
        for rank in self._ranks:
            rank.kill()
            rank.wait()
            for pipe in (rank.stdin, rank.stdout):
                if pipe is not None:
                    pipe.close()
        self._errors.close()

    def _answer(self, rank: subprocess.Popen[str]) -> dict[str, Any]:
        assert rank.stdout is not None
        ready, _, _ = select.select([rank.stdout], [], [], PATIENCE)
        line = rank.stdout.readline() if ready else ""
        return understood(self.contender, line, self._errors)


def begin(contender: str) -> dict[str, dict[str, float]]:
    """Return what it costs a contender to begin, in a fresh process.

    Raises:
        WorkerError: It is absent or failed.
    """
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", MODULE, contender, "--cold", "--started", str(time.time())]
        process = start(command, environment(0, 1, 0), errors, stdin=subprocess.DEVNULL)
        try:
            out, _ = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
        return understood(contender, out, errors)


def understood(contender: str, line: str, errors: IO[str]) -> dict[str, Any]:
    """Read an answer.

    Raises:
        WorkerError: There is none, or it tells of a failure.
    """
    if not line:
        errors.seek(0)
        raise WorkerError(f"{contender} did not answer: {errors.read()[-2000:].strip()}")
    answer: dict[str, Any] = json.loads(line)
    for failure in ("absent", "error"):
        if failure in answer:
            raise WorkerError(f"{contender}: {answer[failure]}")
    return answer


def start(command: Sequence[str], variables: dict[str, str], errors: IO[str], *, stdin: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=ROOT, env=variables, stdin=stdin, stdout=subprocess.PIPE, stderr=errors, text=True
    )


def environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """Return the variables of a process: one thread, a CPU, no network, and a launcher's where there are several."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if processes > 1:
        variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        variables |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return variables


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
