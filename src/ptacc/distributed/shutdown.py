"""The end of the process: threads of the communication come to rest before the interpreter goes.

A thread of gloo frees the tensors of a collective after it has told the caller that they are there, and takes the
interpreter's lock for that. One that asks for the lock of an interpreter which is ending takes the process with it
("terminate called without an active exception"): of scripts that end in a collective, one in seven did.
"""

from __future__ import annotations

import atexit
import contextlib
import time
from pathlib import Path

REST_SECONDS = 2.0
"""How long the threads have at most."""
PAUSE = 0.005
CALM_LOOKS = 3
"""Looks in a row at which no thread may have anything to do."""


def wait_for_gloo_at_exit() -> None:
    """Have the threads of the communication come to rest as the process ends. Calling it again changes nothing."""
    atexit.unregister(wait_until_gloo_is_idle)
    atexit.register(wait_until_gloo_is_idle)


def wait_until_gloo_is_idle() -> None:
    """Leave the interpreter's lock to the threads of the communication until they are idle."""
    deadline = time.monotonic() + REST_SECONDS
    calm = 0
    while calm < CALM_LOOKS and time.monotonic() < deadline:
        time.sleep(PAUSE)  # without the lock
        calm = 0 if is_gloo_busy() else calm + 1


def is_gloo_busy() -> bool:
    """Say whether a thread of gloo has something to do; False where the system does not tell."""
    for thread in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = thread.read_text().partition("(")[2].rpartition(") ")
            if name.startswith("pt_gloo") and rest.startswith("R"):
                return True
    return False
