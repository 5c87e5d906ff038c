"""Signal handlers for a run: a signal is recorded as a request to stop, on which all ranks then agree."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from types import FrameType


@contextlib.contextmanager
def signal_handlers(signals: Collection[signal.Signals], on_signal: Callable[[str, int], None]) -> Iterator[None]:
    """Call `on_signal(name, exit_code)` for each of `signals` that this process receives within the block.

    Previous handlers are called as well, and restored after the block. Python's default handler for SIGINT, which
    raises `KeyboardInterrupt`, is called from the second SIGINT on. Nothing changes outside of the main thread, in
    which alone Python allows handlers, or for handlers that were not installed from Python.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in signals if signal.getsignal(number) is not None}
    received: set[int] = set()

    def handle(number: int, frame: FrameType | None) -> None:
        is_first = number not in received
        received.add(number)
        on_signal(signal.Signals(number).name, 128 + number)
        handler = previous[signal.Signals(number)]
        if callable(handler) and not (handler is signal.default_int_handler and is_first):
            handler(number, frame)

    try:
        for number in previous:
            signal.signal(number, handle)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
