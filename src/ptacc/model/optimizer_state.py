"""The parameter groups of an optimizer: their settings, restored by value, and their parameters by name."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ptacc.errors import CheckpointError
from ptacc.model.optimizer_dict import OptimizerDict
from ptacc.model.state_dict import canonical_name
from ptacc.tensors.structures import map_tensors
from ptacc.types.protocols import StateDict
from ptacc.validation import list_some

NAMES = "parameter_names"
"""The names of the parameters of each group, in the saved state of an optimizer."""

TRAIN_WEIGHTS = "train_weights"
"""The weights of train mode by name, in the saved state of an optimizer with modes."""

# ---- settings


def save_settings(optimizer: Optimizer) -> Callable[[], None]:
    """Save the settings of an optimizer's groups by value, and return a function that restores them.

    Tensors and lists that hold settings stay the same objects. Settings that were added are removed. A group that was
    added keeps its settings, and all groups keep the optimizer's own values.
    """
    own = own_values(optimizer)
    saved = [
        {name: (value, _copy_value(value)) for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]

    def restore() -> None:
        # The groups may be other objects by now, since loading a state replaces them.
        for group, settings in zip(optimizer.param_groups, saved, strict=False):
            for name in group.keys() - settings.keys() - {"params"}:
                del group[name]  # such as `initial_lr`, which the next scheduler would start from
            for name, (value, copied) in settings.items():
                if name in own:
                    continue
                _restore_value(value, copied)
                group[name] = value

    return restore


def own_values(optimizer: Optimizer) -> set[str]:
    """Return the entries of parameter groups that an optimizer changes itself, such as a count of its steps.

    They are among its defaults, and its constructor does not take them.
    """
    if isinstance(optimizer, OptimizerDict):
        return set().union(*(own_values(one) for _, one in optimizer.items()))
    arguments = inspect.signature(type(optimizer)).parameters
    takes_any = any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values())
    return set() if takes_any else optimizer.defaults.keys() - arguments.keys()


def _copy_value(value: object) -> Any:
    """Copy what may be changed in place: tensors, lists, and those within tuples."""
    changeable = isinstance(value, Tensor | list | tuple)
    return map_tensors(lambda tensor: tensor.detach().clone(), value) if changeable else value


@torch.no_grad()
def _restore_value(value: object, copied: Any) -> None:
    """Restore the tensors and lists of a setting in place from their copies."""
    if isinstance(value, Tensor):
        value.copy_(copied)
    elif isinstance(value, list):
        value[:] = copied
    elif isinstance(value, tuple):
        for part, copied_part in zip(value, copied, strict=True):
            _restore_value(part, copied_part)


# ---- parameters by name


def group_names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """Return the names of the parameters in each group. A tied parameter has the first of its names in the alphabet.

    Parameters that an engine has put in the place of the model's have empty names.
    """
    names: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        canonical = canonical_name(name)
        names[parameter] = min(canonical, names.get(parameter, canonical))
    return [[names.get(parameter, "") for parameter in group["params"]] for group in optimizer.param_groups]


def add_names(model: nn.Module, optimizer: Optimizer, state: StateDict) -> StateDict:
    """Add the names of the parameters to the state of an optimizer, which torch numbers by their position."""
    names = group_names(model, optimizer)
    return state if any("" in group for group in names) else {**state, NAMES: names}


def name_differences(model: nn.Module, optimizer: Optimizer, state: StateDict) -> Iterator[str]:
    """Yield the differences between the parameter groups of an optimizer and those of a saved state.

    A state without names, such as that of an engine, is compared by the numbers of parameters.
    """
    if NAMES not in state:
        here, there = (
            [len(group["params"]) for group in groups] for groups in (optimizer.param_groups, state["param_groups"])
        )
        if here != there:
            yield f"the optimizer's groups have {here} parameters, and those of the checkpoint {there}"
        return
    present, saved = group_names(model, optimizer), state[NAMES]
    for owner, groups, other in (("optimizer", present, saved), ("checkpoint", saved, present)):
        contents = {frozenset(names) for names in other}
        for index, names in enumerate(groups):
            if frozenset(names) not in contents:
                rest = "checkpoint's optimizer" if owner == "optimizer" else "optimizer"
                held = f"group {index} of the {owner} holds {list_some(names)}"
                hint = ". A callback that adds it during a run has to add it in on_run_start, too, if progress says so"
                yield f"{held}, and no group of the {rest} holds just these{hint * (len(saved) > len(present))}"


def check_names(model: nn.Module, optimizer: Optimizer, state: StateDict) -> None:
    """Raise `CheckpointError` for a saved state whose groups hold other parameters."""
    if different := list(name_differences(model, optimizer, state)):
        raise CheckpointError(
            f"The state of {type(optimizer).__name__} is of other parameter groups:\n  " + "\n  ".join(different)
        )


def replace_parameters(model: nn.Module, optimizer: Optimizer, state: StateDict, names: frozenset[str]) -> StateDict:
    """Return a saved state with an optimizer's own parameters of some names in place of the saved ones, without states.

    A group keeps the saved settings if it holds other parameters too. One without names is returned unchanged.
    """
    if NAMES not in state:
        return state
    own, fresh = group_names(model, optimizer), itertools.count(sum(map(len, state[NAMES])))
    added = {frozenset(group) - names: [name for name in group if name in names] for group in own}
    groups: list[tuple[list[str], dict[str, Any]]] = []
    for saved_names, group in zip(state[NAMES], state["param_groups"], strict=True):
        kept = {n: index for n, index in zip(saved_names, group["params"], strict=True) if n not in names}
        new = {name: next(fresh) for name in added.get(frozenset(kept), ())}
        if kept:
            groups.append(([*kept, *new], {**group, "params": [*kept.values(), *new.values()]}))
    for own_names, group in zip(own, optimizer.param_groups, strict=True):
        if names.issuperset(own_names):
            groups.append((own_names, {**group, "params": [next(fresh) for _ in own_names]}))
    used = {index for _, group in groups for index in group["params"]}
    return {
        **state,
        NAMES: [group for group, _ in groups],
        "param_groups": [settings for _, settings in groups],
        "state": {index: value for index, value in state["state"].items() if index in used},
    }


def order_by_name(model: nn.Module, optimizer: Optimizer, state: StateDict) -> StateDict:
    """Return a saved state with its groups and parameters in the order of an optimizer's. One without names is kept.

    Its groups hold the same parameters, as `check_names` checks.
    """
    if NAMES not in state:
        return state
    saved = list(zip(state[NAMES], state["param_groups"], strict=True))
    indices = {name: index for names, group in saved for name, index in zip(names, group["params"], strict=True)}
    settings = {frozenset(names): group for names, group in saved}
    groups = []
    for names in group_names(model, optimizer):
        kept = {name: value for name, value in settings[frozenset(names)].items() if name != "param_names"}
        groups.append({**kept, "params": [indices[name] for name in names]})
    return {**{key: value for key, value in state.items() if key not in (NAMES, TRAIN_WEIGHTS)}, "param_groups": groups}
