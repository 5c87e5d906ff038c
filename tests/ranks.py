"""Real processes for tests: `run_ranks` forks ranks of one job, `launch` runs a whole command."""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Generic, TypeVar, TypeVarTuple

import psutil
import torch

ArgTs = TypeVarTuple("ArgTs")
ResultT = TypeVar("ResultT")
FORK = multiprocessing.get_context("fork")


class RankFailed(Exception):  # noqa: N818 - reads as an event: `with pytest.raises(RankFailed, match="rank 1")`
    """A rank raised, or ended without a result."""

    def __init__(self, rank: int, what: str) -> None:
        super().__init__(f"rank {rank}: {what}")
        self.rank = rank


@dataclass(frozen=True)
class Rank(Generic[ResultT]):
    process: ForkProcess
    pipe: "Connection[bytes, bytes]"

    def receive(self, rank: int) -> ResultT:
        """Return the rank's result.

        Raises:
            RankFailed: the worker raised, or the process ended without a result.
        """
        try:
            result, failure = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.process.join(5)
            raise RankFailed(rank, f"ended without a result, exit code {self.process.exitcode}") from None
        if failure is not None:
            raise RankFailed(rank, failure)
        outcome: ResultT = result
        return outcome


def run_ranks(
    worker: Callable[[*ArgTs], ResultT],
    world_size: int,
    *args: *ArgTs,
    timeout: float = 60.0,
    may_die: Collection[int] = (),
) -> list[ResultT]:
    """Run `worker(*args)` in `world_size` forked processes and return the results in the order of ranks.

    The variables of a launcher are set (`RANK`, `WORLD_SIZE`, `MASTER_PORT`, ...), and `ACCELERATE_USE_CPU`,
    which a worker that starts DeepSpeed or FSDP removes from `os.environ` first. The worker may be a closure;
    its result is pickled. The first failure ends the other ranks, which would only wait for the failed one.
    Ranks in `may_die` may end without a result, and are left out of the results.

    A fork has no copies of threads: a thread pool of this process (of a parallel torch operation, for example)
    can make a child hang. `conftest.py` limits torch to one thread for that reason.

    Raises:
        RankFailed: a rank raised; the message has the rank and its traceback.
        TimeoutError: ranks were not done after `timeout` seconds; the message has their numbers, and the
            standard error the line that each of them was at.
    """
    deadline = time.monotonic() + timeout
    port = find_free_port()
    ranks: list[Rank[ResultT]] = []
    results: dict[int, ResultT] = {}
    dead: set[int] = set()
    try:
        environments = (make_environment(rank, world_size, port) for rank in range(world_size))
        ranks.extend(start_rank(worker, args, environment, timeout) for environment in environments)
        while len(results) + len(dead) < world_size:
            waiting = {ranks[rank].pipe: rank for rank in range(world_size) if rank not in results.keys() | dead}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"after {timeout:g} s no result from ranks {sorted(waiting.values())}")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting[pipe]
                try:
                    results[rank] = ranks[rank].receive(rank)
                except RankFailed:
                    if rank not in may_die:
                        raise
                    dead.add(rank)
    finally:
        end_ranks(ranks, kill=len(results) < world_size)
    return [results[rank] for rank in sorted(results)]


def make_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_rank(
    worker: Callable[[*ArgTs], ResultT], args: tuple[*ArgTs], environment: dict[str, str], timeout: float
) -> Rank[ResultT]:
    parent_end, child_end = FORK.Pipe()

    def body() -> None:
        parent_end.close()
        run_worker(worker, args, environment, child_end, timeout)

    process = FORK.Process(target=body)
    with warnings.catch_warnings():
        # Python 3.12 warns of any fork in a process with threads, such as tqdm's, which a child does not need.
        warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
        process.start()
    # Closed before the next fork: otherwise a later rank holds it open, and the end of this one is never detected.
    child_end.close()
    return Rank(process, parent_end)


def run_worker(
    worker: Callable[[*ArgTs], ResultT],
    args: tuple[*ArgTs],
    environment: dict[str, str],
    pipe: "Connection[bytes, bytes]",
    timeout: float,
) -> None:
    gc.freeze()  # what the parent has left, such as a loader with its workers, is not to be collected here
    os.environ.update(environment)
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(0.9 * timeout, file=2)
    try:
        # Plain pickle: `pipe.send` would pass tensors in shared memory, which ends with this process.
        message = pickle.dumps((worker(*args), None))
    except BaseException:
        message = pickle.dumps((None, traceback.format_exc()))
    faulthandler.cancel_dump_traceback_later()
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send_bytes(message)
    # Rank 0 serves the store and must not exit before the others are done: each waits for the parent.
    wait([pipe])
    # Not `sys.exit`: a gloo thread that is still freeing a tensor aborts an interpreter that shuts down.
    os._exit(0)


def end_ranks(ranks: Sequence[Rank[ResultT]], *, kill: bool) -> None:
    for rank in ranks:
        if kill:
            rank.process.kill()
        rank.pipe.close()
    for rank in ranks:
        rank.process.join(5)
        if rank.process.is_alive():
            rank.process.kill()
            rank.process.join()
        rank.process.close()


def launch(
    command: Sequence[str], env: Mapping[str, str] | None = None, timeout: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run a whole command, such as `torchrun` or `accelerate launch`; return its output and exit code.

    `env` is added to this process's environment. On time-out the command and all that it started are killed.

    Raises:
        TimeoutError: the command was not done after `timeout` seconds; the message has what it had printed.
    """
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException as error:
        kill_tree(process.pid)
        out, err = process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise TimeoutError(f"{list(command)} not done after {timeout:g} s\n{out}\n{err}") from None
        raise
    return subprocess.CompletedProcess(list(command), process.returncode, out, err)


def kill_tree(pid: int) -> None:
    """Kill `pid`, the leader of a session, and its descendants: torchrun puts its workers into their own."""
    descendants = psutil.Process(pid).children(recursive=True)
    os.killpg(pid, signal.SIGKILL)
    for process in descendants:
        with suppress(psutil.NoSuchProcess):
            process.kill()
