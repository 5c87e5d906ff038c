"""Modules and metrics among a trainer's options: a weighted loss, a teacher. A run has them on its device."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ptacc.tensors.devices import HOST
from ptacc.tensors.structures import children


def find_option_modules(trainer: Any) -> dict[str, nn.Module]:
    """Return the modules among the options and the class attributes of a trainer, each once, by their places.

    They may be in tuples, lists, mappings and dataclasses, and may be what a partial or a bound method calls: a place
    is `loss_func`, or `losses.0`.
    """
    options = {field.name: getattr(trainer, field.name) for field in dataclasses.fields(trainer) if field.init}
    for base in type(trainer).__mro__:
        options = {name: value for name, value in vars(base).items() if name[:2] != "__"} | options
    return dict(iterate_modules("", options, set()))


def find_trained_options(trainer: Any, optimizer: Optimizer) -> dict[str, nn.Module]:
    """Return the modules among a trainer's options of which an optimizer has parameters, without the model's own."""
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    outside = trained.difference(trainer.unwrapped_model.parameters())
    if not outside:
        return {}
    modules = find_option_modules(trainer)
    return {place: module for place, module in modules.items() if not outside.isdisjoint(module.parameters())}


def iterate_modules(place: str, value: object, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules in a structure by their places, without those within another one.

    `seen` are the ids of the values that were visited. Those of this structure are added.
    """
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield place, value
        return
    for name, part in list_parts(value):
        yield from iterate_modules(f"{place}.{name}" if place else f"{name}", part, seen)


def list_parts(value: object) -> Iterable[tuple[object, object]]:
    """Return the values in a container by name or number, and what a partial or a bound method calls."""
    if isinstance(value, partial):
        return {"func": value.func, "args": value.args, **value.keywords}.items()
    return [("self", value.__self__)] if isinstance(value, MethodType) else children(value)


@contextlib.contextmanager
def options_moved(trainer: Any, model: nn.Module, device: torch.device) -> Generator[None]:
    """Move the modules among a trainer's options from the host to a device for the block, and back after it.

    Modules with a tensor elsewhere stay where they are: the user has placed them. A module that holds tensors of the
    model, which the engine moves, is moved without them. Nothing is moved if the device is the host.
    """
    moved: list[nn.Module] = []
    if device.type != HOST.type:
        own = {id(tensor) for tensor in iterate_tensors(model)}
        modules = [module for module in find_option_modules(trainer).values() if module is not model]
        apart = (part for module in modules for part in split_off(module, own))
        moved += [part for part in apart if is_on_host(part)]
    try:
        for module in moved:
            module.to(device)
        yield
    finally:
        for module in moved:
            module.to(HOST)


def iterate_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters and the buffers of a module."""
    yield from module.parameters()
    yield from module.buffers()


def split_off(module: nn.Module, excluded: set[int]) -> Iterator[nn.Module]:
    """Yield a module, or those of its submodules that hold none of the excluded tensors."""
    if not any(id(tensor) in excluded for tensor in iterate_tensors(module)):
        yield module
        return
    for child in module.children():
        yield from split_off(child, excluded)


def is_on_host(module: nn.Module) -> bool:
    """Return whether all tensors of a module are on the host, and the states of the metrics in it."""
    # torchmetrics keeps states outside of the buffers, and their device in this attribute.
    metric_devices = (vars(part).get("_device") for part in module.modules())
    devices = (*metric_devices, *(tensor.device for tensor in iterate_tensors(module)))
    return all(device.type == HOST.type for device in devices if isinstance(device, torch.device))
