"""The console of a process: messages, lines and a progress bar, which do not break each other."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Generator, Sequence
from typing import Any, TextIO

from tqdm import tqdm
from typing_extensions import override

LOGGER = logging.getLogger("ptacc")
COLUMNS, ROWS = 80, 20
"""Size of a notebook, and of a terminal that does not report its size."""
NARROW = 60
"""Columns below which a progress bar is text alone."""
SHORTEST_BAR = 6

# ---- where to write


def is_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def is_watched(file: TextIO | None) -> bool:
    """Return whether a user watches what is written to a file: it is a terminal, or the output of a notebook."""
    is_terminal: bool = getattr(file, "isatty", lambda: False)()
    return is_terminal or (is_notebook() and file in (sys.stdout, sys.stderr))


def standard_error() -> TextIO | None:
    """Return the stream for messages and bars: a notebook shows standard error as errors. None without a console."""
    return sys.stdout if is_notebook() else sys.stderr


def count_columns(file: TextIO | None) -> int | None:
    """Return the width of a terminal or of a notebook; None for a log file, whose lines may be of any length."""
    if file is None or not is_watched(file):
        return None
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream without a descriptor
        if not is_notebook() and (columns := os.get_terminal_size(file.fileno()).columns):
            return columns
    return COLUMNS


# ---- lines and messages


def write_line(text: str, file: TextIO | None) -> None:
    """Write a line above the progress bars, at once. Without a console, `file` is None, and nothing is written."""
    if file is not None:
        with tqdm.external_write_mode(file):
            print(text, file=file, flush=True)


class ConsoleHandler(logging.StreamHandler[TextIO]):
    """Writes messages above the progress bars, unless another handler was added after it."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        if not logging.root.handlers and LOGGER.handlers == [self]:
            with tqdm.external_write_mode(self.stream):
                super().emit(record)


@contextlib.contextmanager
def messages_shown() -> Generator[None]:
    """Show messages of level INFO and above within the block, unless the root logger is configured.

    A handler and a level of the logger `ptacc` that the user has set are used.
    """
    if logging.root.handlers or not LOGGER.propagate:
        yield
        return
    handler, level = ConsoleHandler(standard_error()), LOGGER.level
    if not LOGGER.handlers:
        LOGGER.addHandler(handler)
    LOGGER.setLevel(level or logging.INFO)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        if LOGGER.level == logging.INFO:
            LOGGER.setLevel(level)


# ---- the bar


class Bar:
    """A line that shows progress in a terminal or a notebook. It appears at the first `show`, and goes at `close`."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._bar: tqdm[Any] | None = None

    def show(self, title: str, done: int, total: int | None, notes: Sequence[str]) -> None:
        """Show that `done` of `total` are complete, followed by the first notes, as many as fit."""
        if self._bar is None:
            self._bar = make_bar(self._file)
        columns, rows = measure(self._file)
        counter = f" {done:,}" if total is None else f" {done:,}/{total:,}"
        has_bar = total is not None and columns >= NARROW
        room = columns - len(title) - len(counter) - (len(" ||") + SHORTEST_BAR if has_bar else 0)
        self._bar.bar_format = ("{desc} |{bar}|" if has_bar else "{desc}") + counter + fit(notes, room)
        self._bar.desc, self._bar.n, self._bar.nrows = title, min(done / total, 1.0) if total else 0.0, rows
        self._bar.refresh()

    def close(self, *, is_complete: bool) -> None:
        """Remove the line. In a notebook, a bar that is not complete stays, in red."""
        if self._bar is not None:
            self._bar.n = 1.0 if is_complete else self._bar.n
            self._bar.close()
            self._bar = None


def make_bar(file: TextIO) -> tqdm[Any]:
    """Create a bar for the terminal, or for the notebook that this process is the kernel of."""
    with warnings.catch_warnings():  # in a notebook without ipywidgets, the bar is text
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm as auto
    bar: tqdm[Any] = auto(total=1.0, file=file, leave=False, dynamic_ncols=True, bar_format=" ")
    # tqdm's own function hides the bar in a terminal that does not report its size.
    bar.dynamic_ncols = lambda _: measure(file)  # type: ignore[assignment]
    return bar


def measure(file: TextIO) -> tuple[int, int]:
    """Return the columns and rows for bars. The last column is left free, since some terminals wrap there."""
    return (count_columns(file) or COLUMNS) - 1, ROWS


def fit(notes: Sequence[str], room: int) -> str:
    """Return the first notes that fit into `room` characters.

    Example:
        >>> fit(["loss 0.5", "00:10 left", "12 items/s"], 25)
        ', loss 0.5, 00:10 left'
    """
    text = ""
    for note in notes:
        if len(text) + len(note) + 2 > room:
            break
        text += f", {note}"
    return text
