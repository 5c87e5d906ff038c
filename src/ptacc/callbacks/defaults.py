"""The callbacks that every trainer starts with."""

from __future__ import annotations

from ptacc.callbacks.nonfinite import StopOnNonFinite
from ptacc.callbacks.print_metrics import PrintMetrics
from ptacc.callbacks.progress_bar import ProgressBar
from ptacc.core.callback import Callback
from ptacc.core.hooks import TrainerCore


def default_callbacks() -> list[Callback[TrainerCore]]:
    """Make a progress bar, printed metrics, and a stop at the first loss that is no number."""
    return [StopOnNonFinite(), ProgressBar(), PrintMetrics()]
