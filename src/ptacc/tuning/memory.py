"""The memory of a device: its size, and detecting that it ran out."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable

import torch

OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "status_alloc_failed",
    "cudnn_status_not_supported",
    "unable to find an engine",
)
"""Parts of the messages of other errors than `OutOfMemoryError`: of the host's allocator, of cuBLAS and cuDNN.

cuDNN raises the last two if no algorithm gets the memory that it needs, among other reasons.
"""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or a cause of it, means that memory ran out.

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
    has_message = isinstance(error, RuntimeError) and any(text in str(error).lower() for text in OUT_OF_MEMORY)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or has_message or is_out_of_memory(error.__cause__)


def out_of_memory_message(act: Callable[[], object]) -> str | None:
    """Call `act`, free unused memory, and return the first line of the error if memory ran out; None if it did not."""
    message = None
    try:
        act()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        message = (str(error) or type(error).__name__).partition("\n")[0]
    # Not in the block above, where the traceback still holds the tensors of the forward pass.
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
        if hasattr(torch.accelerator, "empty_host_cache"):  # pinned memory; older versions of torch lack it
            torch.accelerator.empty_host_cache()
    return message


def total_memory(device: torch.device) -> int:
    """Return the bytes of memory of a device, or those of the host that this process may use."""
    if device.type != "cpu":
        return int(torch.accelerator.get_memory_info(device)[1])
    if sys.platform == "win32":
        return 0  # unknown there
    import resource

    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
    return physical if allowed == resource.RLIM_INFINITY else min(physical, allowed)
