"""A model's weights and an optimizer's state: under which names they are saved, and how they are put back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ptacc.errors import CheckpointError
from ptacc.tensors.dtensor import AssembledTensor, Shard, is_dtensor, match_placement
from ptacc.types.protocols import StateDict

COMPILED = "_orig_mod."
"""What `torch.compile` puts into the names of a module's tensors."""


def canonical_name(name: str) -> str:
    """Return the name that a tensor or a module has in the bare, uncompiled model."""
    return name.replace(COMPILED, "")


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Return the names in a model's `state_dict()`, by their canonical names: those of the bare, uncompiled model."""
    return {canonical_name(name): name for name in model.state_dict()}


def get_weights(model: nn.Module) -> StateDict:
    """Return a model's `state_dict()` under canonical names."""
    return {canonical_name(name): value for name, value in model.state_dict().items()}


def load_weights(model: nn.Module, weights: StateDict, *, strict: bool = True) -> None:
    """Load tensors by their canonical names.

    Raises:
        CheckpointError: They are not the model's; the message has each difference.
    """
    mine, names = get_weights(model), canonical_names(model)
    if strict and (different := sorted(weight_differences(mine, weights))):
        raise CheckpointError("The weights are of another model:\n  " + "\n  ".join(different))
    fitting = {name: match_placement(mine[name], value) if name in mine else value for name, value in weights.items()}
    model.load_state_dict({names.get(name, name): value for name, value in fitting.items()}, strict=strict)


def weight_differences(mine: Mapping[str, Any], weights: Mapping[str, Any]) -> Iterator[str]:
    """Iterate over the differences between a model's own tensors and those that are to be loaded, both by name."""
    yield from (f"the model's {name} is not in the checkpoint" for name in mine if name not in weights)
    yield from (f"the checkpoint's {name} is not in the model" for name in weights if name not in mine)
    for name in filter(weights.__contains__, mine):
        here, there = describe_tensor(mine[name]), describe_tensor(weights[name])
        if here != there:
            yield f"the model's {name} is {here}, and the checkpoint's {there}"


def describe_tensor(value: object) -> str:
    """Tell the dtype and the shape of a tensor, be it whole or dealt, and the type of anything else."""
    if isinstance(value, Shard):
        return f"{str(value.local.dtype).removeprefix('torch.')} {value.shape}"
    if isinstance(value, AssembledTensor):
        return describe_tensor(value.tensor)
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def load_optimizer_state(optimizer: Optimizer, state: StateDict) -> None:
    """Load an optimizer's state, each tensor in the dtype it was saved in: torch's own way casts it to the parameter's.

    Raises:
        CheckpointError: It is the state of other parameters.
    """
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    fitting = {
        number: {name: match_placement(parameter, value) for name, value in state["state"][number].items()}
        for number, parameter in zip(numbers, parameters, strict=False)
        if number in state["state"]
    }
    try:
        optimizer.load_state_dict({**state, "state": {**state["state"], **fitting}})
    except ValueError as error:
        raise CheckpointError(f"The state of {type(optimizer).__name__} is of other parameters: {error}.") from error
    for number, parameter in zip(numbers, parameters, strict=True):
        for name, saved in fitting.get(number, {}).items():
            loaded = optimizer.state[parameter].get(name)
            if isinstance(saved, Tensor) and isinstance(loaded, Tensor) and saved.dtype != loaded.dtype:
                optimizer.state[parameter][name] = saved.to(loaded.device, copy=True)


def held_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over what this process holds of each of a model's parameters."""
    for name, parameter in model.named_parameters():
        yield canonical_name(name), parameter.to_local() if is_dtensor(parameter) else parameter


def first_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of a tensor that holds a number which is none, None if there is none. Reads the device."""
    floating = [(name, tensor.detach()) for name, tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if not floating:
        return None
    # NaN is both the least and the greatest there. A norm would be one call, and takes ten times as long on the CPU.
    is_finite: list[bool] = torch.stack(
        [torch.isfinite(torch.stack(torch.aminmax(p))).all() for _, p in floating]
    ).tolist()
    return next((name for (name, _), good in zip(floating, is_finite, strict=True) if not good), None)
