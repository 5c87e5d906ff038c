"""What a run changes of its user's objects, kept and put back."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ptacc.loop.loop import TrainingLoop
from ptacc.model.state_dict import load_optimizer_state
from ptacc.rng import preserved_streams
from ptacc.tensors.structures import map_tensors
from ptacc.types.protocols import Stateful

PutBack = Callable[[], object]


@contextlib.contextmanager
def preserve_state(trainer: TrainingLoop[Any, Any, Any], data: Iterable[object] = ()) -> Iterator[None]:
    """Put back after the block what a run changes of a trainer's components, and all random streams.

    Copies lie on the host, so that a device has as much memory within the block as without it.

    Args:
        trainer: Its model and other modules, and its optimizers.
        data: Datasets, loaders and samplers, which may remember where they are.
    """
    modules = [option for option in vars(trainer).values() if isinstance(option, nn.Module)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserved_streams(devices=True))
        for module in modules:
            stack.callback(keep_module(module))
        for slot in trainer.optimizer_slots():
            stack.callback(keep_optimizer(slot.optimizer))
        for part in data:
            stack.callback(keep_position(part))
        yield


def keep_module(module: nn.Module) -> PutBack:
    """Keep the parameters, gradients, buffers and the extra state of a module; it has no gradients from here on."""
    parameters = list(module.parameters())
    values = [on_host(parameter) for parameter in parameters]
    gradients = [parameter.grad for parameter in parameters]
    buffers = [
        (owner, name, on_host(buffer))
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False, remove_duplicate=False)
    ]
    extras = [
        (owner, copy.deepcopy(owner.get_extra_state()))
        for owner in module.modules()
        if type(owner).get_extra_state is not nn.Module.get_extra_state
    ]
    for parameter in parameters:
        parameter.grad = None

    @torch.no_grad()
    def put_back() -> None:
        for parameter, value, gradient in zip(parameters, values, gradients, strict=True):
            if parameter.shape == value.shape:  # else an error came between, and an engine holds the weights
                parameter.copy_(value)
                parameter.grad = gradient
        for owner, name, value in buffers:
            setattr(owner, name, value.to(getattr(owner, name).device))
        for owner, state in extras:
            owner.set_extra_state(state)

    return put_back


def keep_optimizer(optimizer: Optimizer) -> PutBack:
    """Keep the state of an optimizer and the values of its groups, the very objects where these are tensors."""
    state = map_tensors(on_host, optimizer.state_dict())
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]

    def put_back() -> None:
        load_optimizer_state(optimizer, state)
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update(values)

    return put_back


def keep_position(part: object) -> PutBack:
    """Keep where a dataset, a loader or a sampler is: its state, or that of its generator."""
    generator = getattr(part, "generator", None)
    if isinstance(part, Stateful):
        state = copy.deepcopy(part.state_dict())
        return lambda: part.load_state_dict(state)
    if isinstance(generator, torch.Generator):
        drawn = generator.get_state()
        return lambda: generator.set_state(drawn)
    return lambda: None


def find_stateful_parts(data: object, samplers: Iterable[object] = ()) -> list[object]:
    """Return what may remember where it is: data, and what a loader or a batch sampler is made of."""
    parts = [data, *samplers]
    if isinstance(data, DataLoader):
        parts += [data.dataset, data.sampler, data.batch_sampler]
    parts += [getattr(part, "sampler", None) for part in parts if part is not data]
    return list({id(part): part for part in parts if part is not None}.values())


def on_host(tensor: Tensor) -> Tensor:
    """Return a copy on the host."""
    return tensor.detach().to("cpu", copy=True)
