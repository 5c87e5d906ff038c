"""The messages of a run."""

from __future__ import annotations

import logging

from ptacc.console import LOGGER
from ptacc.core.base import TrainerBase


def announce(trainer: TrainerBase, message: str, level: int = logging.INFO) -> None:
    """Send a message to the logger `ptacc`, on rank 0. A copy made by a search reports nothing."""
    if trainer.distributed.is_main and not trainer.is_isolated:
        LOGGER.log(level, message)
