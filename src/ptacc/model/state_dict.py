"""Weights and optimizer state: the names under which they are saved, and loading them into sharded or plain tensors."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ptacc.errors import CheckpointError
from ptacc.tensors.dtensor import Shard, match_placement
from ptacc.tensors.structures import map_tensors
from ptacc.types.protocols import StateDict

EXTRA_STATE = "_extra_state"
"""torch's name for what `get_extra_state` of a module returns: a value of any type."""
COMPILED = "_orig_mod."
"""What `torch.compile` adds to the names of a module's tensors."""


def canonical_name(name: str) -> str:
    """Return the name that a tensor or a module has in the user's model, before it is compiled.

    Example:
        >>> canonical_name("blocks.0._orig_mod.weight")
        'blocks.0.weight'
    """
    return name.replace(COMPILED, "")


def copy_to_host(value: Any) -> Any:
    """Return a copy of an entry of a `state_dict()`, with its tensors on the host."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    return copy.deepcopy(map_tensors(lambda tensor: tensor.detach().cpu(), value))


def get_weights(model: nn.Module) -> StateDict:
    """Return a model's `state_dict()` by canonical names."""
    return {canonical_name(name): value for name, value in model.state_dict().items()}


def load_weights(model: nn.Module, weights: StateDict, *, strict: bool = True) -> None:
    """Load weights by canonical names. Plain tensors are sharded, and DTensors gathered, as the model's are.

    If `strict`, all names, shapes and dtypes must be the model's. If not, names may be missing or unknown.

    Raises:
        CheckpointError: They are of another model; the message lists each difference.
    """
    own = model.state_dict()
    present = {canonical_name(name): value for name, value in own.items()}
    if strict and (different := sorted(text for _, text in weight_differences(present, weights))):
        raise CheckpointError("The weights are of another model:\n  " + "\n  ".join(different))
    names = {canonical_name(name): name for name in own}
    placed = {n: match_placement(present[n], value) if n in present else value for n, value in weights.items()}
    own.clear()  # it keeps the versions of the modules' formats: without them, modules convert the state as an old one
    own.update({names.get(name, name): value for name, value in placed.items()})
    model.load_state_dict(own, strict=strict)


def weight_differences(
    present: Mapping[str, Any], saved: Mapping[str, Any], owner: str = "model"
) -> Iterator[tuple[str, str]]:
    """Yield the differences in name, dtype and shape between a module's tensors and saved ones: (name, description)."""
    yield from ((name, f"the {owner}'s {name} is not in the checkpoint") for name in present if name not in saved)
    yield from ((name, f"the checkpoint's {name} is not in the {owner}") for name in saved if name not in present)
    for name in filter(saved.__contains__, present):
        if name.rpartition(".")[2] == EXTRA_STATE:  # of any type and shape
            continue
        here, there = describe_tensor(present[name]), describe_tensor(saved[name])
        if here != there:
            yield name, f"the {owner}'s {name} is {here}, and the checkpoint's {there}"


def drop_misfits(present: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the saved values without those whose shape is not that of the present one."""
    return {
        name: value
        for name, value in saved.items()
        if name not in present or full_shape(value) == full_shape(present[name])
    }


def describe_tensor(value: object) -> str:
    """Return the dtype and the full shape of a tensor or a shard, such as `float32 (4, 2)`; for others the type."""
    tensor = value.local if isinstance(value, Shard) else value
    if not isinstance(tensor, Tensor):
        return type(value).__name__
    return f"{str(tensor.dtype).removeprefix('torch.')} {full_shape(value)}"


def full_shape(value: object) -> tuple[int, ...] | None:
    """Return the full shape of a tensor or a shard, None for another value."""
    return tuple(value.shape) if isinstance(value, Tensor | Shard) else None


# ---- buffers that are not in the state dict


def non_persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that are not in a module's `state_dict()`, by canonical names."""
    persistent = get_weights(module).keys()
    buffers = {canonical_name(name): buffer for name, buffer in module.named_buffers(remove_duplicate=False)}
    return {name: buffer for name, buffer in buffers.items() if name not in persistent}


@torch.no_grad()
def load_non_persistent_buffers(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Restore buffers by canonical names. One that is missing, or has another shape or dtype, is registered.

    Buffers of submodules that do not exist are left out.
    """
    owners = {canonical_name(f"{name}." if name else ""): child for name, child in module.named_modules()}
    device = next((tensor.device for tensor in itertools.chain(module.parameters(), module.buffers())), None)
    for name, saved in buffers.items():
        path, dot, leaf = name.rpartition(".")
        owner = owners.get(path + dot)
        present = getattr(owner, leaf, None)
        if isinstance(present, Tensor) and describe_tensor(present) == describe_tensor(saved):
            if not torch.equal(present, placed := saved.to(present.device)):
                present.copy_(placed)
        elif owner is not None:
            owner.register_buffer(leaf, saved.to(device, copy=True), persistent=False)


# ---- optimizers


def load_optimizer_state(optimizer: Optimizer, state: StateDict) -> None:
    """Load an optimizer's state with the dtypes that were saved: torch itself casts them to the parameter's dtype.

    Raises:
        CheckpointError: The state is of an optimizer with other parameters.
    """
    indices = [index for group in state["param_groups"] for index in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    placed = {
        index: {name: match_placement(parameter, value) for name, value in state["state"][index].items()}
        for index, parameter in zip(indices, parameters, strict=False)
        if index in state["state"]
    }
    try:
        optimizer.load_state_dict({**state, "state": {**state["state"], **placed}})
    except ValueError as error:
        raise CheckpointError(f"The state of {type(optimizer).__name__} is of other parameters: {error}.") from error
    for index, parameter in zip(indices, parameters, strict=True):
        for name, saved in placed.get(index, {}).items():
            loaded = optimizer.state[parameter].get(name)
            if isinstance(saved, Tensor) and isinstance(loaded, Tensor) and saved.dtype != loaded.dtype:
                optimizer.state[parameter][name] = saved.to(loaded.device, copy=True)


def make_placeholder(tensor: Tensor) -> Tensor:
    """Return zeros on the host with the dtype and shape of `tensor`, which take no memory. Engines gather to rank 0."""
    return torch.zeros((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)


def is_placeholder(tensor: Tensor) -> bool:
    """Return whether a tensor stands for one that was gathered on rank 0."""
    return 0 in tensor.stride()


def first_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity, None if all are finite. Reads from the device."""
    floating = [(name, tensor.detach()) for name, tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if not floating:
        return None
    # A NaN is both minimum and maximum in torch. A norm would be one call, but takes ten times as long on the CPU.
    is_finite: list[bool] = torch.stack(
        [torch.isfinite(torch.stack(torch.aminmax(tensor))).all() for _, tensor in floating]
    ).tolist()
    return next((name for (name, _), good in zip(floating, is_finite, strict=True) if not good), None)
