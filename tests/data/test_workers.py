"""Workers of a loader end with their main process."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from ptacc.data.workers import start_iteration
from ptacc.distributed.failure import is_running


def wait_for_end(process: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(process) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(process)


@pytest.mark.timeout(60)
def test_a_worker_ends_whose_main_process_is_killed_while_it_starts(tmp_path: Path) -> None:
    noted = tmp_path / "worker"

    def kill_parent(_: int) -> None:
        noted.write_text(str(os.getpid()))
        parent = os.getppid()
        os.kill(parent, signal.SIGKILL)
        wait_for_end(parent, 10)

    def read() -> None:
        data: list[int] = [1, 2]
        next(start_iteration(DataLoader(data, num_workers=1, worker_init_fn=kill_parent)))  # type: ignore[arg-type]

    main = multiprocessing.get_context("fork").Process(target=read)
    main.start()
    main.join(30)
    worker = int(noted.read_text())
    has_ended = wait_for_end(worker, 10)
    if not has_ended:
        os.kill(worker, signal.SIGKILL)
    assert has_ended
