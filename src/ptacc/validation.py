"""Checks of the values of options and arguments, and how values appear in messages."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import math
import os
from collections.abc import Collection, Generator, Sequence
from numbers import Integral
from pathlib import Path

from ptacc.errors import OptionError


def check_at_least(owner: str, name: str, value: object, least: int, advice: str = "") -> None:
    """Raise `OptionError` unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise OptionError(f"{owner}({name}={value!r}): must be an integer of at least {least}. {advice}".rstrip())


def check_choice(owner: str, name: str, value: object, choices: Collection[object], default: str) -> None:
    """Raise `OptionError` unless `value` is one of `choices`, or None, which stands for `default`."""
    if value is not None and value not in choices:
        listed = ", ".join(map(repr, choices))
        raise OptionError(f"{owner}({name}={value!r}): must be one of {listed}, or None for {default}.")


def check_positive(owner: str, name: str, value: object, advice: str = "") -> None:
    """Raise `OptionError` unless `value` is a finite number above 0."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise OptionError(f"{owner}({name}={value!r}): must be a finite number above 0. {advice}".rstrip())


def absolute_path(owner: str, name: str, value: object, advice: str = "") -> Path:
    """Return a local path that does not depend on the working directory, with `~` expanded.

    Raises:
        OptionError: The path is empty, or a URL.
    """
    if not isinstance(value, str | os.PathLike) or not str(value).strip() or "://" in str(value):
        raise OptionError(f"{owner}({name}={str(value)!r}): must be a local path. {advice}".rstrip())
    path: str | os.PathLike[str] = value
    return Path(path).expanduser().absolute()


_VALUE_WIDTH = 40


def check_keywords(call: str, given: Collection[str], known: Collection[str], advice: str = "") -> None:
    """Raise `TypeError` for a keyword that is not in `known`, with the closest one that is."""
    for name in given:
        if name not in known:
            raise TypeError(f"{call} has no keyword {name!r}. {did_you_mean(name, known)}{advice}".rstrip())


def value_text(value: object) -> str:
    """Return a short text for a value: its `repr` if that is short, otherwise its name or the name of its type.

    Example:
        >>> from torch import nn
        >>> value_text("bf16"), value_text(len), value_text(nn.Linear(2, 3, bias=False))
        ("'bf16'", 'len', 'Linear(...)')
    """
    if isinstance(value, type) or inspect.isroutine(value):
        return value.__name__
    text = repr(value)
    is_short = len(text) <= _VALUE_WIDTH and "\n" not in text and not text.startswith("<")
    return text if is_short else f"{type(value).__name__}(...)"


def list_some(names: Sequence[str], most: int = 3) -> str:
    """List the first names, and the number of the others.

    Example:
        >>> list_some(["a", "b", "c"]), list_some(["a", "b", "c"], most=2)
        ('a, b, c', 'a, b and 1 more')
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Return "Did you mean ...? " with the closest known name; empty if none is close."""
    found = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f"Did you mean `{found[0]}`? " if found else ""


@contextlib.contextmanager
def with_install_note(what: str, requirement: str) -> Generator[None]:
    """Add to a `ModuleNotFoundError` of the block how to install the missing package.

    Example:
        >>> with with_install_note("history.plot()", "ptacc[plot]"):
        ...     raise ModuleNotFoundError(name="matplotlib.figure")
        Traceback (most recent call last):
        ModuleNotFoundError...
        history.plot() needs matplotlib: pip install 'ptacc[plot]'.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        error.add_note(f"{what} needs {package}: pip install {requirement!r}.")
        raise
