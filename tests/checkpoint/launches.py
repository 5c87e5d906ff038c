"""The processes of a run that is to be killed: starting them, and reading what they have logged."""

import functools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch

from tests.ranks import FORK, find_free_port, make_environment


@dataclass
class StepLog:
    """What a process has logged so far."""

    path: Path
    lines: list[dict[str, Any]] = field(default_factory=list)
    _read: int = 0

    def look(self) -> None:
        """Read what was logged since the last call."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._read)
                *lines, _ = file.read().split(b"\n")
            self.lines += [json.loads(line) for line in lines]
            self._read += sum(len(line) + 1 for line in lines)

    def before(self, moment: float) -> list[dict[str, Any]]:
        """Return what was logged before a moment of the monotonic clock."""
        return [line for line in self.lines if line["at"] <= moment]


class Launch:
    """The processes of a run that is to be killed, each with a trail."""

    def __init__(self, work: Callable[[], object], world_size: int, trail: Path) -> None:
        """Start `work` in processes with the environment of a launcher."""
        trail.parent.mkdir(parents=True, exist_ok=True)
        port = find_free_port()
        self.trails = [StepLog(Path(f"{trail}.{rank}")) for rank in range(world_size)]
        self.processes: list[ForkProcess] = []
        for rank in range(world_size):
            environment = make_environment(rank, world_size, port)
            process = FORK.Process(target=functools.partial(in_environment, environment, work))
            with warnings.catch_warnings():
                # Python 3.12 warns of a fork in a process with threads. The child does not need them.
                warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
                process.start()
            self.processes.append(process)

    def await_lines(self, rank: int, count: int, seconds: float = 30.0) -> bool:
        """Wait until a process has logged so many lines; return False if it ends before that."""
        deadline = time.monotonic() + seconds
        while len(self.trails[rank].lines) < count:
            if not self.processes[rank].is_alive():
                return False
            assert time.monotonic() < deadline, f"rank {rank} has logged {len(self.trails[rank].lines)} of {count}"
            time.sleep(0.0005)
            self.trails[rank].look()
        return True

    def send(self, rank: int, number: int) -> None:
        """Send a signal to a process."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def exit_codes(self, seconds: float) -> list[int | None]:
        """Wait for the ends of the processes, and return their exit codes; kill those that do not end in time."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in late:
            self.processes[rank].kill()
            self.processes[rank].join()
        assert not late, f"ranks {late} had not ended after {seconds:g} s"
        for trail in self.trails:
            trail.look()
        return [process.exitcode for process in self.processes]


def in_environment(environment: dict[str, str], work: Callable[[], object]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        work()
    except Exception as error:  # a traceback of each that was killed on purpose would hide any other
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        raise SystemExit(1) from None
