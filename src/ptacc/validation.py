"""Checks of single values, for options and arguments alike."""

from __future__ import annotations

import math
from numbers import Integral

from ptacc.errors import OptionError


def check_at_least(owner: str, name: str, value: object, least: int, advice: str = "") -> None:
    """Raise `OptionError` unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise OptionError(f"{owner}({name}={value!r}): must be a whole number, at least {least}. {advice}".rstrip())
    if int(value) < least:
        raise OptionError(f"{owner}({name}={value!r}): must be at least {least}. {advice}".rstrip())


def check_positive(owner: str, name: str, value: object, advice: str = "") -> None:
    """Raise `OptionError` unless `value` is a finite number above 0."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise OptionError(f"{owner}({name}={value!r}): must be a finite number above 0. {advice}".rstrip())
