"""Trackers: they store the configuration and the values of runs, in files or in another package."""

import ptacc.public
from ptacc.tracking.accelerate import AccelerateTracker
from ptacc.tracking.files import CSVTracker, FileTracker, JSONLinesTracker

__all__ = ["AccelerateTracker", "CSVTracker", "FileTracker", "JSONLinesTracker"]

ptacc.public.set_public_module(__name__, __all__)
