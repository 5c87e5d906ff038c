"""Signals: a request to terminate becomes a wish to stop, which all processes agree on."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def heeding_termination(wish: Callable[[str, int], None]) -> Iterator[None]:
    """Call `wish(name, exit code)` when this process is asked to terminate within the block, and let it go on.

    The handler that was there before is called as well, and put back. Python allows handlers in the main thread only;
    in another, nothing is changed.
    """
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return

    def heed(number: int, frame: FrameType | None) -> None:
        wish(signal.Signals(number).name, 128 + number)
        if callable(before):
            before(number, frame)

    signal.signal(signal.SIGTERM, heed)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
