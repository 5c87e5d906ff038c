"""End of a process that waits for a failed rank in a call that does not return.

Closed connections interrupt almost every wait for another rank: see `failure.py`. They do not interrupt a kernel of
NCCL, in which `.item()` waits for NCCL's timeout of 10 minutes. Nor do they always interrupt gloo while it sends a
large tensor. In such a call no exception can be raised, and no handler of a signal runs. A thread therefore looks for
failures of other ranks in the rendezvous store, and ends the process.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import traceback
import weakref
from typing import NoReturn

from ptacc.distributed.failure import Failure, FailureMonitor

POLL_SECONDS = 1.0
"""Time between two requests to the store, which take about 0.1 ms each."""
GRACE_SECONDS = 10.0
"""Time in which a process can raise the failure of another rank by itself."""


def start_watchdog(monitor: FailureMonitor) -> None:
    """Watch the blocks of a monitor for failures of other ranks, until it is deleted or the process exits."""
    is_over = threading.Event()
    arguments = (weakref.ref(monitor), is_over)
    thread = threading.Thread(target=watch, args=arguments, name="watchdog of failures", daemon=True)
    thread.start()
    atexit.register(stop_watchdog, thread, is_over)


def stop_watchdog(thread: threading.Thread, is_over: threading.Event) -> None:
    """End the thread, since one that requests the GIL while the interpreter shuts down aborts the process."""
    is_over.set()
    thread.join(POLL_SECONDS)


def watch(reference: weakref.ref[FailureMonitor], is_over: threading.Event) -> None:
    """End the process once it has been within a block for `GRACE_SECONDS` after another rank reported a failure."""
    seconds = 0.0
    while not is_over.wait(POLL_SECONDS):
        monitor = reference()
        if monitor is None:
            return
        try:
            failure = monitor.find_unseen_failure()
        except RuntimeError:  # the store has ended, as after a run in which rank 0 was the first to exit
            return
        seconds = 0.0 if failure is None else seconds + POLL_SECONDS
        if failure is not None and seconds > GRACE_SECONDS:
            end_process(monitor.rank, failure)
        del monitor


def end_process(rank: int, failure: Failure) -> NoReturn:
    """Print where the process waits, and for whom, and exit as after an exception."""
    frames = sys._current_frames()  # noqa: SLF001  # documented, in spite of the underscore
    stack = traceback.format_stack(frames.get(threading.main_thread().ident or 0))
    sys.stderr.write(
        f"{''.join(stack)}RankFailedError: {failure}\n"
        f"Rank {rank} was here {GRACE_SECONDS:g} s later, in a call that does not return, and was ended.\n"
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
