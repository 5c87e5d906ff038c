"""A signal that a launcher, a scheduler or a terminal sends to all processes ends the run alone, which saves itself."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from ptacc.data.workers import start_iteration
from ptacc.distributed.signals import signal_handlers
from tests.ranks import kill_tree

SCRIPT = Path(__file__).parent / "scripts" / "terminated.py"
PYTHON = (sys.executable, str(SCRIPT))
TORCHRUN = (str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2", str(SCRIPT))
SECONDS = 60


def await_files(paths: Iterable[Path], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not all(path.exists() for path in paths):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def terminate_all(command: Iterable[str], directory: Path, world_size: int, number: signal.Signals) -> tuple[int, str]:
    """Run a command until its ranks are ready, and send a signal to all processes that it started, and to itself."""
    process = subprocess.Popen(
        [*command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        await_files([Path(f"{directory}.ready.{rank}") for rank in range(world_size)], process)
        for descendant in psutil.Process(process.pid).children(recursive=True):
            descendant.send_signal(number)
        process.send_signal(number)
        _, errors = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
    return process.returncode, errors


@pytest.mark.parametrize("phase", ["train", "evaluate"])
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.prove)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_signal_to_all_processes_saves_the_run(world_size: int, start: str, phase: str, tmp_path: Path) -> None:
    command = [*(PYTHON if world_size == 1 else TORCHRUN), phase, str(tmp_path / "run"), start]
    code, errors = terminate_all(command, tmp_path / "run", world_size, signal.SIGTERM)
    assert code == (143 if world_size == 1 else 1), errors  # 1 is torchrun's own
    assert [Path(f"{tmp_path}/run.exit.{rank}").read_text() for rank in range(world_size)] == ["143"] * world_size
    assert len(list((tmp_path / "run").glob("step-*"))) == 1


class Waiting(Dataset[Tensor]):
    """Waits in each sample until a file exists."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return 4

    @override
    def __getitem__(self, index: int) -> Tensor:
        while not self.path.exists():
            time.sleep(0.01)
        return torch.tensor(index)


@pytest.fixture
def termination_handled() -> Iterator[None]:
    with signal_handlers({signal.SIGTERM}, lambda name, code: None):
        yield


@pytest.mark.usefixtures("termination_handled")
def test_workers_ignore_a_signal_of_the_run_until_their_iterator_is_dropped(tmp_path: Path) -> None:
    loader = DataLoader(Waiting(tmp_path / "go"), num_workers=1)
    iterator = start_iteration(loader)
    (worker,) = psutil.Process().children()
    worker.send_signal(signal.SIGTERM)
    (tmp_path / "go").touch()
    assert len(list(iterator)) == 4
    assert loader.worker_init_fn is None


def test_a_worker_that_never_returns_does_not_keep_its_process_from_exiting(tmp_path: Path) -> None:
    code = (
        "import signal, sys; from pathlib import Path; from torch.utils.data import DataLoader\n"
        "from ptacc.data.workers import start_iteration; from ptacc.distributed.signals import signal_handlers\n"
        "from tests.distributed.test_signals import Waiting\n"
        "with signal_handlers({signal.SIGTERM}, print):\n"
        "    iterator = start_iteration(DataLoader(Waiting(Path(sys.argv[1])), num_workers=1))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "never")], timeout=SECONDS, check=False)
    assert ended.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_ignored_signal_stays_ignored(number: signal.Signals) -> None:
    previous = signal.signal(number, signal.SIG_IGN)
    try:
        with signal_handlers({number}, lambda name, code: pytest.fail(name)):
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, previous)
