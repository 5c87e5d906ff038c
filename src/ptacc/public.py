"""Where a public name is found: `__module__` of the classes that a public module re-exports."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable


def set_public_module(module: str, names: Iterable[str]) -> None:
    """Set `__module__` of the classes that `module` re-exports, for reprs and the reference.

    Annotations are resolved first: they are strings that only the defining module can evaluate. Functions keep their
    module, by which `typing.get_overloads` finds their overloads.
    """
    for name in names:
        value = vars(sys.modules[module])[name]
        if isinstance(value, type):
            value.__annotations__ = inspect.get_annotations(value, eval_str=True)
            value.__module__ = module
