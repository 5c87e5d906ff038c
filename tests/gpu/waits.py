"""Counting how often the host waits for the GPU."""

import contextlib
import warnings
from collections.abc import Generator

import torch


class Waits:
    """Counts the calls for which the host waits for the GPU, as far as torch detects them."""

    def __init__(self) -> None:
        self.count = 0

    @contextlib.contextmanager
    def counted(self) -> Generator[None]:
        """Count within the block."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
        self.count += sum("called a synchronizing" in str(warning.message) for warning in caught)
