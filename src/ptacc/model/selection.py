"""Selection of submodules by class and by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from ptacc.errors import ModelError, OptionError
from ptacc.validation import did_you_mean, list_some, value_text

ModuleSelector: TypeAlias = type[nn.Module] | str
"""A class of submodules, or their names as in `named_modules()`, in which `*` stands for any characters."""


def check_selectors(owner: str, option: str, selectors: object) -> None:
    """Raise `OptionError` if an option is not a list of classes and names."""
    if isinstance(selectors, str | type) or not isinstance(selectors, Sequence):
        raise OptionError(
            f"{owner}({option}={value_text(selectors)}): must be a list of classes and names. Write `{option}=[...]`, "
            "also for a single one."
        )
    for selector in selectors:
        if not isinstance(selector, str) and not (isinstance(selector, type) and issubclass(selector, nn.Module)):
            raise OptionError(
                f"{owner}({option}=[...]): {value_text(selector)} is neither a class of modules nor a name. Give the "
                "class itself, or the name of a submodule as in model.named_modules()."
            )


def select_submodules(model: nn.Module, selectors: Sequence[ModuleSelector], option: str) -> list[nn.Module]:
    """Return the outermost submodules that match a selector.

    A `ModuleList` or `ModuleDict` is never selected, since it is not called; the modules in it are. `option` is the
    name of the option, for errors.

    Raises:
        ModelError: No submodule matches one of the selectors.
    """
    submodules = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and type(module).forward is not nn.Module.forward
    }
    selected: set[str] = set()
    for selector in selectors:
        selected |= find_matches(selector, model, submodules, option).keys()
    outermost = (name for name in submodules if name in selected and selected.isdisjoint(list_parents(name)))
    return list(dict.fromkeys(submodules[name] for name in outermost))  # a module may have several names


def find_matches(
    selector: ModuleSelector, model: nn.Module, submodules: Mapping[str, nn.Module], option: str
) -> dict[str, nn.Module]:
    """Return those of a model's submodules by name that match a selector.

    Raises:
        ModelError: None of them does. The message has a suggestion, and the known names or classes.
    """
    if isinstance(selector, str):
        matches = {name: module for name, module in submodules.items() if fnmatchcase(name, selector)}
        need, sought, known = f"has the name {selector!r}", selector, list(submodules)
    else:
        matches = {name: module for name, module in submodules.items() if isinstance(module, selector)}
        need, sought = f"is a {selector.__name__}", selector.__name__
        known = sorted({type(module).__name__ for module in submodules.values()})
    if not matches:
        raise ModelError(
            f"{option}: {type(model).__name__} calls no submodule that {need}. {did_you_mean(sought, known)}"
            f"There are: {list_some(known, most=10) or 'none at all'}."
        )
    return matches


def list_parents(name: str) -> list[str]:
    """Return the names of the modules that contain a submodule.

    Example:
        >>> list_parents("encoder.layers.0")
        ['encoder', 'encoder.layers']
    """
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
