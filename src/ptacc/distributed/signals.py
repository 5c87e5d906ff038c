"""Signals: a request to terminate becomes a wish to stop, which all processes agree on."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from types import FrameType


@contextlib.contextmanager
def signal_handlers(signals: Collection[signal.Signals], wish: Callable[[str, int], None]) -> Iterator[None]:
    """Call `wish(name, exit code)` when this process is sent one of `signals` within the block, and let it go on.

    Handlers that were there before are called as well, and put back; Python's own for Ctrl-C, which raises, from the
    second time on. Python allows handlers in the main thread only; in another, nothing is changed. Nor is a handler
    that Python does not know.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in signals if signal.getsignal(number) is not None}
    asked: set[int] = set()

    def heed(number: int, frame: FrameType | None) -> None:
        is_first = number not in asked
        asked.add(number)
        wish(signal.Signals(number).name, 128 + number)
        handler = before[signal.Signals(number)]
        if callable(handler) and not (handler is signal.default_int_handler and is_first):
            handler(number, frame)

    try:
        for number in before:
            signal.signal(number, heed)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
