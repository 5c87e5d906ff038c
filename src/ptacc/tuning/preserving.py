"""Saving the state of the objects that a run changes, and restoring it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ptacc.loop.loop import TrainingLoop
from ptacc.model.state_dict import load_optimizer_state
from ptacc.rng import preserved_streams
from ptacc.tensors.structures import map_tensors
from ptacc.types.protocols import Stateful

Restore: TypeAlias = Callable[[], object]


@contextlib.contextmanager
def preserve_state(trainer: TrainingLoop[Any, Any, Any], data: Iterable[object]) -> Iterator[None]:
    """Save the state of a trainer's options and optimizers, of data and of the global generators, and restore it.

    Options that are modules, generators or `Stateful` are saved, and so are the positions of datasets, loaders and
    samplers. The saved copies are on the host, so that the block has all of the device's memory.
    """
    options = list(vars(trainer).values())
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserved_streams(devices=True))
        for module in (option for option in options if isinstance(option, nn.Module)):
            stack.callback(save_module(module))
        for slot in trainer.optimizer_slots():
            stack.callback(save_optimizer(slot.optimizer))
        for part in (*options, *find_stateful_parts(data)):
            if not isinstance(part, nn.Module | Optimizer | type):
                stack.callback(save_position(part))
        yield


def save_module(module: nn.Module) -> Restore:
    """Save parameters, buffers, extra state and flags of a module. Its gradients are saved and cleared."""
    parameters = [(p, copy_to_host(p), p.grad, p.requires_grad) for p in module.parameters()]
    buffers = [
        (owner, name, copy_to_host(buffer))
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False, remove_duplicate=False)
    ]
    extra_states = [
        (owner, copy.deepcopy(owner.get_extra_state()))
        for owner in module.modules()
        if type(owner).get_extra_state is not nn.Module.get_extra_state
    ]
    flags = [(owner, owner.training) for owner in module.modules()]
    for parameter in module.parameters():
        parameter.grad = None

    @torch.no_grad()
    def restore() -> None:
        for parameter, value, gradient, requires_grad in parameters:
            if parameter.shape == value.shape:  # else an error left the weights with the engine
                parameter.copy_(value)
                parameter.grad = gradient
            parameter.requires_grad_(requires_grad)
        for owner, name, buffer in buffers:
            setattr(owner, name, buffer.to(getattr(owner, name).device))
        for owner, state in extra_states:
            owner.set_extra_state(state)
        for owner, training in flags:
            owner.training = training

    return restore


def save_optimizer(optimizer: Optimizer) -> Restore:
    """Save the state, the groups and the attributes of an optimizer. Tensors in groups stay the same objects."""
    state = map_tensors(copy_to_host, optimizer.state_dict())
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    attributes = set(vars(optimizer))

    @torch.no_grad()
    def restore() -> None:
        load_optimizer_state(optimizer, state)
        for group, values, saved in zip(optimizer.param_groups, groups, state["param_groups"], strict=True):
            for name, value in values.items():
                group[name] = value.copy_(saved[name]) if isinstance(value, Tensor) else value
        for name in vars(optimizer).keys() - attributes:
            delattr(optimizer, name)  # a scheduler of torch's wraps `step`

    return restore


def save_position(part: object) -> Restore:
    """Save the state of a dataset, a loader, a sampler or an option, or that of its generator, if it has one."""
    generator = part if isinstance(part, torch.Generator) else getattr(part, "generator", None)
    if isinstance(part, Stateful):
        state = copy.deepcopy(part.state_dict())
        return lambda: part.load_state_dict(state)
    if isinstance(generator, torch.Generator):
        position = generator.get_state()
        return lambda: generator.set_state(position)
    return lambda: None


def find_stateful_parts(data: Iterable[object]) -> list[object]:
    """Return the data itself, the values of mappings, and the parts of loaders and batch samplers, each once."""
    parts: list[object] = []
    for part in data:
        parts += part.values() if isinstance(part, Mapping) else [part]
    for loader in [part for part in parts if isinstance(part, DataLoader)]:
        parts += [loader.dataset, loader.sampler, loader.batch_sampler]
    parts += [getattr(part, "sampler", None) for part in parts]
    return list({id(part): part for part in parts if part is not None}.values())


def copy_to_host(tensor: Tensor) -> Tensor:
    """Return a copy on the host."""
    return tensor.detach().to("cpu", copy=True)
