"""Workers of a loader leave the signals of a run to the main process, and end with it.

The main process stops them when the run ends. If it is killed, torch's workers notice that their parent has changed.
Those that had not started by then do not notice it, and would wait for ever.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ptacc.distributed.failure import is_running
from ptacc.distributed.signals import handled_signals
from ptacc.types.aliases import T


@dataclass(frozen=True)
class WorkerInit:
    """Initialises a worker: it ignores some signals as long as the main process needs it, and ends if that has ended.

    A launcher, a scheduler or a terminal sends a signal to all processes. torch's workers end at it, so that the main
    process fails before it has saved the run.

    Args:
        signals: The signals, which the main process has blocked while it starts the worker.
        is_released: Boolean scalar in shared memory: whether the main process has dropped the worker's iterator, or is
            exiting. It then ends workers that do not react by SIGTERM.
        init: The user's function, called with the number of the worker.
    """

    signals: Collection[signal.Signals]
    is_released: Tensor
    init: Callable[[int], object] | None

    def __call__(self, worker: int) -> None:
        """Called by torch in the worker, with its number."""
        for number in self.signals:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.signals)
        if self.init is not None:
            self.init(worker)
        parent = parent_process()
        if parent is not None and parent.pid is not None and not is_running(parent.pid):
            os._exit(1)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.is_released:
            os._exit(128 + number)


def start_iteration(loader: Iterable[T]) -> Iterator[T]:
    """Return `iter(loader)`. Workers that it starts leave the signals of the run to this process, and end with it."""
    options: Any = loader
    starts_workers = getattr(loader, "num_workers", 0) and hasattr(loader, "worker_init_fn")
    signals = handled_signals()
    if sys.platform == "win32" or not starts_workers:
        return iter(loader)
    is_released = torch.zeros((), dtype=torch.bool, device="cpu")
    is_released.share_memory_()  # type: ignore[no-untyped-call]
    init = options.worker_init_fn
    options.worker_init_fn = WorkerInit(signals, is_released, init)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        options.worker_init_fn = init
    Finalize(iterator, is_released.fill_, (True,), exitpriority=0)
    return iterator
