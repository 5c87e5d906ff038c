"""Memory: which errors say that it ran out, how it is freed, and how some of it is held back."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator

import torch

WORDS = ("out of memory", "can't allocate memory", "status_alloc_failed")
"""What errors of devices, of the host's allocator, of cuBLAS and of cuDNN say that are no `OutOfMemoryError`."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Say whether an error, or what it was raised from, is that memory ran out.

    Example:
        >>> is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
        True
        >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
        True
        >>> is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
        False
    """
    if error is None:
        return False
    says_so = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in WORDS)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or says_so or is_out_of_memory(error.__cause__)


def out_of_memory_message(act: Callable[[], object]) -> str | None:
    """Return the first line of what `act` says as it runs out of memory, which is freed then; None if it does not."""
    complaint = None
    try:
        act()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        complaint = (str(error) or type(error).__name__).partition("\n")[0]
    # Not in the block above, where the traceback still holds on to all that the forward pass made.
    free_memory()
    return complaint


def free_memory() -> None:
    """Give memory that nobody holds back to the device."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


@contextlib.contextmanager
def reserve_memory(size: int, device: torch.device) -> Iterator[None]:
    """Have `size` bytes less on a device, for the block."""
    ballast = torch.empty(size, dtype=torch.uint8, device=device)
    try:
        yield
    finally:
        del ballast


def total_memory(device: torch.device) -> int:
    """Return the bytes of memory that a device has, or that this process may have of the host's."""
    if device.type != "cpu":
        total: int = torch.accelerator.get_memory_info(device)[1]
        return total
    if sys.platform == "win32":
        return 0  # it does not tell
    import resource

    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
    return physical if allowed == resource.RLIM_INFINITY else min(physical, allowed)
