"""Checks of single values, for options and arguments alike."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral

from ptacc.errors import OptionError


def check_at_least(owner: str, name: str, value: object, least: int, advice: str = "") -> None:
    """Raise `OptionError` unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise OptionError(f"{owner}({name}={value!r}): must be a whole number, at least {least}. {advice}".rstrip())
    if int(value) < least:
        raise OptionError(f"{owner}({name}={value!r}): must be at least {least}. {advice}".rstrip())


def check_choice(owner: str, name: str, value: object, choices: Collection[object], otherwise: str) -> None:
    """Raise `OptionError` unless `value` is one of `choices`, or None, which stands for `otherwise`."""
    if value is not None and value not in choices:
        listed = ", ".join(map(repr, choices))
        raise OptionError(f"{owner}({name}={value!r}): must be one of {listed}, or None for {otherwise}.")


def check_positive(owner: str, name: str, value: object, advice: str = "") -> None:
    """Raise `OptionError` unless `value` is a finite number above 0."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise OptionError(f"{owner}({name}={value!r}): must be a finite number above 0. {advice}".rstrip())
