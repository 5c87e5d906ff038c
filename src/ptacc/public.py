"""Makes re-exported classes name the public module that they are imported from."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable


def set_public_module(module: str, names: Iterable[str]) -> None:
    """Set `__module__` of the classes that `module` re-exports, as shown in reprs and the reference.

    Annotations are evaluated first, since they are strings that refer to names of the defining module. Functions keep
    their `__module__`, which `typing.get_overloads` uses to find their overloads.
    """
    for name in names:
        value = vars(sys.modules[module])[name]
        if isinstance(value, type):
            value.__annotations__ = inspect.get_annotations(value, eval_str=True)
            value.__module__ = module
