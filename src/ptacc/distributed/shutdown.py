"""Wait at the end of the process until gloo's threads are idle.

A gloo thread frees the tensors of a collective after the caller has received them, and needs the GIL for that. A thread
that requests the GIL while the interpreter shuts down aborts the process ("terminate called without an active
exception"). One in seven scripts whose last call was a collective ended that way.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

MAX_WAIT_SECONDS = 2.0
POLL_SECONDS = 0.005
IDLE_POLLS = 3
"""Number of consecutive polls that have to find all threads idle."""


def wait_until_gloo_is_idle() -> None:
    """Release the GIL to gloo's threads until they are idle, for `MAX_WAIT_SECONDS` at most."""
    deadline = time.monotonic() + MAX_WAIT_SECONDS
    idle_polls = 0
    while idle_polls < IDLE_POLLS and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)  # releases the GIL
        idle_polls = 0 if is_gloo_busy() else idle_polls + 1


def is_gloo_busy() -> bool:
    """Return whether a gloo thread is running. Always False on systems without `/proc`."""
    for thread in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = thread.read_text().partition("(")[2].rpartition(") ")
            if name.startswith("pt_gloo") and rest.startswith("R"):
                return True
    return False
