"""The parameter groups of an optimizer: their settings, restored by value, and their parameters by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ptacc.model.state_dict import canonical_name


def save_settings(optimizer: Optimizer) -> Callable[[], None]:
    """Save the settings of an optimizer's groups by value, and return a function that restores them.

    Tensors and lists that hold settings stay the same objects. Settings that were added are removed. A group that was
    added keeps its settings.
    """
    saved = [
        {name: _save_value(value) for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]

    def restore() -> None:
        # The groups may be other objects by now, since loading a state replaces them.
        for group, settings in zip(optimizer.param_groups, saved, strict=False):
            for name in group.keys() - settings.keys() - {"params"}:
                del group[name]  # such as `initial_lr`, which the next scheduler would start from
            group.update({name: get_value() for name, get_value in settings.items()})

    return restore


def _save_value(value: object) -> Callable[[], object]:
    """Save a setting, and return a function that returns the same object with the value that it has now."""
    if isinstance(value, Tensor):
        copy = value.detach().clone()

        def restore_tensor() -> object:
            with torch.no_grad():
                return value.copy_(copy)

        return restore_tensor
    if type(value) is tuple:
        parts = tuple(map(_save_value, value))
        return lambda: tuple(get_part() for get_part in parts)
    if isinstance(value, list):
        items = list(map(_save_value, value))

        def restore_list() -> object:
            value[:] = [get_item() for get_item in items]
            return value

        return restore_list
    return lambda: value


def group_names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """Return the names of the parameters in each group. A tied parameter has the first of its names in the alphabet.

    Parameters that an engine has put in the place of the model's have empty names.
    """
    names: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        canonical = canonical_name(name)
        names[parameter] = min(canonical, names.get(parameter, canonical))
    return [[names.get(parameter, "") for parameter in group["params"]] for group in optimizer.param_groups]
