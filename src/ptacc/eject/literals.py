"""Python source of values."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from typing_extensions import override

WIDTH = 88
"""The longest line of a script: the default of ruff and black."""


@dataclass(frozen=True)
class Code:
    """Source that is its own literal, such as a name."""

    text: str

    @override
    def __repr__(self) -> str:
        return self.text


def literal(value: object) -> str:
    """Return the source of a value, with texts as formatters quote them.

    Example:
        >>> print(literal({"encoder.*": (2, "epochs")}))
        {"encoder.*": (2, "epochs")}
    """
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and math.isinf(value):
        return f"{'-' if value < 0 else ''}math.inf"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{literal(key)}: {literal(item)}' for key, item in value.items())}}}"
    if isinstance(value, tuple):
        return f"({', '.join(map(literal, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    return repr(value)


def assignment(name: str, value: object) -> str:
    """Return the source of `name = value`, with one item a line if it is too long.

    Example:
        >>> print(assignment("FROZEN", ["encoder"]))
        FROZEN = ["encoder"]
    """
    text = literal(value)
    if len(f"{name} = {text}") > WIDTH and isinstance(value, list | Mapping):
        items = (
            [{key: item} for key, item in value.items()] if isinstance(value, Mapping) else [[item] for item in value]
        )
        lines = "".join(f"    {literal(item)[1:-1]},\n" for item in items)
        text = f"{text[0]}\n{lines}{text[-1]}"
    return f"{name} = {text}"


def is_plain(value: object) -> bool:
    """Return whether a script can hold a value as a constant."""
    if isinstance(value, tuple | list):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    return type(value) in (bool, int, float, str, type(None), Code)


def call(path: str, function: Callable[..., object], values: Mapping[str, object], first: str = "") -> str | None:
    """Return the source of a call with the arguments that differ from their defaults; None if a value has no source.

    Args:
        path: The source of the function.
        function: The function.
        values: The values of some of its parameters, by name.
        first: The source of the first argument.
    """
    arguments = [first] if first else []
    for name, parameter in [*inspect.signature(function).parameters.items()][len(arguments) :]:
        value = values.get(name, parameter.default)
        if not (is_plain(value) or value is parameter.default):
            return None
        if value is not parameter.default and value != parameter.default:
            arguments.append(f"{name}={literal(value)}")
    return f"{path}({', '.join(arguments)})"
