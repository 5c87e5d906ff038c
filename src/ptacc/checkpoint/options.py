"""The options of `CheckpointMixin`: which values are valid, and paths that do not depend on the working directory."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, get_args

from ptacc.checkpoint.manager import OnError
from ptacc.errors import OptionError
from ptacc.files.paths import parse_absolute
from ptacc.types.monitor import Best
from ptacc.types.progress import Cadence
from ptacc.validation import check_at_least

OPTION_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "checkpoint_dir": (lambda value: isinstance(value, str | PathLike), "a path"),
    "checkpoint_every": (
        lambda value: value is None or isinstance(value, Cadence),
        "a cadence: Steps(500), Epochs(1), Minutes(10), Items(10_000), or None",
    ),
    "resume": (lambda value: isinstance(value, bool | str | PathLike), "True, False, or the path of a checkpoint"),
    "resume_ignore": (lambda value: holds(value, str), "names: {'batch_size'}"),
    "keep_best": (lambda value: value is None or isinstance(value, Best), 'Best("eval_loss"), or None'),
    "checkpoint_signals": (lambda value: holds(value, signal.Signals), "signals: (signal.SIGTERM,)"),
    "checkpoint_errors": (lambda value: value in get_args(OnError), '"raise" or "warn"'),
    "checkpoint_key": (lambda value: value is None or isinstance(value, bytes), "bytes"),
}
"""For each option, whether a value is valid, and which values are."""


def check_values(trainer: object) -> None:
    """Raise `OptionError` for an option with an invalid value."""
    owner = type(trainer).__name__
    for name in ("keep_last", "keep_every"):
        if (count := getattr(trainer, name)) is not None:
            check_at_least(owner, name, count, 1)
    for name, (is_valid, needed) in OPTION_CHECKS.items():
        if not is_valid(value := getattr(trainer, name)):
            raise OptionError(f"{owner}({name}={value!r}): must be {needed}.")


def holds(values: Any, kind: type) -> bool:
    """Return whether a value is a collection of values of one type. A string is not taken for one of strings."""
    is_collection = isinstance(values, Collection) and not isinstance(values, str)
    return is_collection and all(isinstance(value, kind) for value in values)


def absolute_location(trainer: object, name: str) -> str | Path:
    """Return the path or URL that an option has, absolute: a `Path`, unless the option is a string.

    Raises:
        OptionError: The path is empty, or a URL whose file system is unknown or not installed.
    """
    value = getattr(trainer, name)
    try:
        path = parse_absolute(value)
    except OptionError as error:
        raise OptionError(f"{type(trainer).__name__}({name}={value!r}): {error}") from error
    return path if isinstance(value, str) else Path(path)
