"""Signal handlers for a run: a signal is recorded as a request to stop, on which all ranks then agree."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any


@dataclass
class StopHandler:
    """The handler of a signal of a run.

    Args:
        on_signal: Called with the name of the signal, and the exit code of a process that it ends.
        previous: The handler that was installed before. It is called as well, except that Python's default handler for
            SIGINT, which raises `KeyboardInterrupt`, is called from the second SIGINT on.
    """

    on_signal: Callable[[str, int], None]
    previous: Any
    is_first: bool = field(default=True, init=False)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Called by Python between two instructions of the main thread."""
        is_first, self.is_first = self.is_first, False
        self.on_signal(signal.Signals(number).name, 128 + number)
        if callable(self.previous) and not (self.previous is signal.default_int_handler and is_first):
            self.previous(number, frame)


@contextlib.contextmanager
def signal_handlers(signals: Collection[signal.Signals], on_signal: Callable[[str, int], None]) -> Generator[None]:
    """Call `on_signal(name, exit_code)` for each of `signals` that this process receives within the block.

    Previous handlers are called as well, and restored after the block. A signal stays ignored if it was, as SIGHUP is
    under nohup. Nothing changes outside of the main thread, in which alone Python allows handlers, or for handlers
    that were not installed from Python.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in signals}
    replaced = {number: handler for number, handler in previous.items() if handler not in (None, signal.SIG_IGN)}
    try:
        for number, handler in replaced.items():
            signal.signal(number, StopHandler(on_signal, handler))
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


def handled_signals() -> frozenset[signal.Signals]:
    """Return the signals that are handled by a run of this process."""
    numbers = signal.valid_signals()
    return frozenset(signal.Signals(n) for n in numbers if isinstance(signal.getsignal(n), StopHandler))
