"""A cell to read hostile files in: a process of little memory and time, that reports what it opens and runs."""

import codecs
import contextlib
import gc
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

ROOM = 256 << 20
"""Bytes of memory that a trial may take beyond what the process has."""
SECONDS = 20.0
"""What a trial may take; most take milliseconds."""
READING = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK
HARMLESS = (
    "object.",
    "builtins.id",
    "os.listdir",
    "os.scandir",
    "sys._getframe",
    "sys.unraisablehook",
    "cpython.",
    "gc.",
)
"""Events that nothing is run, opened or changed by; every other one is an escape."""

Trial = Callable[[], str]


def run_in_a_cell(trials: Mapping[str, Trial], inside: Path, *, seconds: float = SECONDS) -> dict[str, str]:
    """Run trials one after another in a process of their own, and return what became of each.

    Args:
        trials: By name; each returns a word.
        inside: Where files may be read.
        seconds: What each may take.

    Returns:
        The word; or `escaped:`, `raised:` or `died:` and what it did.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with contextlib.suppress(BaseException):
            _run_all(trials, Guard(inside), writing, seconds)
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:  # noqa: PTH123  # a descriptor
        outcomes: dict[str, str] = dict(json.loads(line) for line in pipe)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {name: outcomes.get(name, f"died: exit code {code}") for name in trials}


class Guard:
    """Notes events of the interpreter that are no reading of files inside a directory."""

    def __init__(self, inside: Path) -> None:
        self.inside = str(inside)
        self.escapes: list[str] = []
        self.watching = False
        for encoding in ("utf-8-sig", "utf-16", "utf-16-be", "utf-16-le", "utf-32", "utf-32-be", "utf-32-le"):
            codecs.lookup(encoding)  # JSON may be in any of them, and Python loads them when they are met
        sys.addaudithook(self.check)

    def check(self, event: str, arguments: tuple[object, ...]) -> None:
        """Check an audit event. The hook cannot be removed from the process."""
        if self.watching and not event.startswith(HARMLESS) and not (event == "open" and self.is_reading(*arguments)):
            self.escapes.append(f"{event}{arguments}"[:200])

    def is_reading(self, path: object, mode: object, flags: object) -> bool:
        """Whether a file that is inside, where its links lead, is opened to be read."""
        if not isinstance(flags, int) or flags & ~READING:
            return False
        if not isinstance(path, str):
            return isinstance(path, int)  # opened already
        if not flags & os.O_NOFOLLOW:
            return os.path.realpath(path).startswith(self.inside)
        parent, name = os.path.split(path)
        # Without a directory in its name, it is opened in one that was opened before.
        return name not in ("", ".", "..") and (not parent or os.path.realpath(parent).startswith(self.inside))

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Watch for as long as this is open."""
        self.escapes.clear()
        self.watching = True
        try:
            yield
        finally:
            self.watching = False


def _run_all(trials: Mapping[str, Trial], guard: Guard, writing: int, seconds: float) -> None:
    gc.freeze()  # else every collection copies the pages of all that the parent made
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for name, trial in trials.items():
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            with guard.watched():
                outcome = trial()
        except BaseException:
            outcome = f"raised: {traceback.format_exc()[-1500:]}"
        if guard.escapes:
            outcome = f"escaped: {', '.join(guard.escapes)}"
        os.write(writing, f"{json.dumps([name, outcome])}\n".encode())
