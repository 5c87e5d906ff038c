"""Choices of submodules, by their classes and their names."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from ptacc.errors import ModelError, OptionError
from ptacc.validation import closest, value_text

ModuleSelector: TypeAlias = type[nn.Module] | str
SHOWN = 10
"""Names that an error shows at most."""


def check_selectors(owner: str, option: str, choices: object) -> None:
    """Raise `OptionError` for what is no list of classes and names."""
    if isinstance(choices, str | type) or not isinstance(choices, Sequence):
        raise OptionError(
            f"{owner}({option}={value_text(choices)}): must be a list of classes and names. Write `{option}=[...]`, "
            "also for a single one."
        )
    for choice in choices:
        if not isinstance(choice, str) and not (isinstance(choice, type) and issubclass(choice, nn.Module)):
            raise OptionError(
                f"{owner}({option}=[...]): {value_text(choice)} is neither a class of modules nor a name. Give the "
                "class itself, or the name of a submodule as in model.named_modules()."
            )


def select_submodules(model: nn.Module, choices: Sequence[ModuleSelector], option: str) -> list[nn.Module]:
    """Return the outermost submodules that are chosen.

    Lists of modules are passed over: they are never called, only what is in them.

    Args:
        model: Where they are.
        choices: What is chosen.
        option: What errors call the choices.

    Raises:
        ModelError: A choice that no submodule matches.
    """
    submodules = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and type(module).forward is not nn.Module.forward
    }
    chosen: set[str] = set()
    for choice in choices:
        found = {name for name, module in submodules.items() if is_match(choice, name, module)}
        if not found:
            raise ModelError(f"{option}: {describe_no_match(choice, model, submodules)}")
        chosen |= found
    outermost = (name for name in submodules if name in chosen and chosen.isdisjoint(list_parents(name)))
    return list(dict.fromkeys(submodules[name] for name in outermost))  # one module may have several names


def is_match(choice: ModuleSelector, name: str, module: nn.Module) -> bool:
    """Say whether a submodule is meant by a choice."""
    return fnmatchcase(name, choice) if isinstance(choice, str) else isinstance(module, choice)


def list_parents(name: str) -> list[str]:
    """Return the names of the modules around a submodule.

    Example:
        >>> list_parents("encoder.layers.0")
        ['encoder', 'encoder.layers']
    """
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def describe_no_match(choice: ModuleSelector, model: nn.Module, submodules: dict[str, nn.Module]) -> str:
    """Say that no submodule matches a choice, and what there is."""
    by_name = isinstance(choice, str)
    asked = repr(choice) if isinstance(choice, str) else choice.__name__
    known = list(submodules) if by_name else sorted({type(module).__name__ for module in submodules.values()})
    hint = closest(choice if isinstance(choice, str) else choice.__name__, known)
    shown = ", ".join(known[:SHOWN]) + (", ..." if len(known) > SHOWN else "")
    return (
        f"{type(model).__name__} calls no submodule that {'has the name' if by_name else 'is a'} {asked}. {hint}"
        f"There are: {shown or 'none at all'}."
    )
