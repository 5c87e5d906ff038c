"""Checks of models, optimizers, callbacks, step outputs and monitors, made before any weight is updated."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NoReturn

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from ptacc.composition.fields import type_text
from ptacc.composition.type_arguments import find_model_mismatch
from ptacc.engines.base import OptimizerSlot, join_trained
from ptacc.errors import LossError, ModelError, MonitorError, OptionError
from ptacc.model.joined_modules import join_modules
from ptacc.types.monitor import Monitor, ValueNames
from ptacc.types.outputs import REPORTED_NAMES, StepOutput
from ptacc.validation import did_you_mean, value_text


def check_not_wrapped(owner: str, model: nn.Module) -> None:
    """Raise `ModelError` for a model that is already wrapped."""
    attributes = ("_orig_mod", "_fsdp_wrapped_module")  # where torch.compile and FSDP store the original model
    if isinstance(model, DistributedDataParallel | DataParallel) or any(hasattr(model, name) for name in attributes):
        raise ModelError(
            f"{owner}(model={type(model).__name__}(...)): the model is already wrapped. Pass the original model: each "
            "run wraps and compiles it, and restores it at its end."
        )


def check_model_class(trainer: type, model: nn.Module) -> None:
    """Raise `OptionError` for a model that is not of the class that the definition of a trainer states."""
    expected = find_model_mismatch(trainer, model)
    if expected is not None:
        check_not_wrapped(trainer.__name__, model)  # a compiled model is not an instance of its class
        raise OptionError(
            f"{trainer.__name__}(model={value_text(model)}): must be an instance of {type_text(expected)}, the type "
            f"argument for the model in the bases of {trainer.__name__}. Without that argument, any model is accepted."
        )


def check_trainable(
    owner: str,
    model: nn.Module,
    slots: Sequence[OptimizerSlot],
    options: Mapping[str, nn.Module],
    *,
    by_closure: bool,
) -> None:
    """Raise `ModelError` for a model and optimizers that cannot be trained. `options` are modules by their places.

    Warns:
        UserWarning: Trainable parameters are in no optimizer: of the model, of a module that is trained with it, or of
            a module among the options in training mode. A teacher in eval mode may have such parameters.
    """
    trained = join_trained(model, slots)
    names = {id(parameter): name for name, parameter in trained.named_parameters()}
    optimized = [parameter for slot in slots for parameter in slot.parameters]
    if foreign := sum(id(parameter) not in names for parameter in optimized):
        raise ModelError(
            f"{owner}: {foreign} of the optimizer's {len(optimized)} parameters are not parameters of the model, nor "
            "of a module among the options. Create the optimizer from this model, `SGD(model.parameters(), ...)`, "
            "after the last change to its layers, and make a loss with parameters an option, such as loss_func."
        )
    if not any(parameter.requires_grad for parameter in optimized):
        raise ModelError(
            f"{owner}: nothing is trainable: none of the optimizer's {len(optimized)} parameters has "
            "requires_grad=True. Set it on those to train."
        )
    for optimizer in () if by_closure else [slot.optimizer for slot in slots]:
        if requires_closure(optimizer):
            raise ModelError(
                f"{owner}: {type(optimizer).__name__}.step() requires a closure. Add ClosureMixin to the bases of "
                f"{owner}."
            )
    ids = {id(parameter) for parameter in optimized}
    in_training = {place: module for place, module in options.items() if module.training}
    named = (*trained.named_parameters(), *join_modules(model, in_training).named_parameters())
    if omitted := list(dict.fromkeys(name for name, p in named if p.requires_grad and id(p) not in ids)):
        warnings.warn(
            f"{owner}: {len(omitted)} trainable parameters are in no optimizer and will not change: "
            f"{', '.join(omitted[:3])}{', ...' if len(omitted) > 3 else ''}. Add them to an optimizer, or set "
            "requires_grad=False on them.",
            stacklevel=4,
        )


def requires_closure(optimizer: Optimizer) -> bool:
    """Return whether the optimizer's `step` has a parameter without a default, as that of LBFGS."""
    _, *parameters = inspect.signature(type(optimizer).step).parameters.values()
    return any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def check_callbacks(owner: str, callbacks: Iterable[object] | object, base: type) -> None:
    """Raise `OptionError` unless `callbacks` is an iterable of instances of `base`."""
    if not isinstance(callbacks, Iterable):
        raise OptionError(
            f"{owner}(callbacks={value_text(callbacks)}): must be a list of callbacks. Write `callbacks=[...]`, also "
            "for one callback, or leave it out."
        )
    for callback in callbacks:
        if isinstance(callback, type):
            raise OptionError(
                f"{owner}(callbacks=[{callback.__name__}]): must be an instance, not a class: {callback.__name__}(...)."
            )
        if not isinstance(callback, base):
            raise OptionError(
                f"{owner}(callbacks=[...]): {callback!r} is not a callback. Derive its class from Callback."
            )


def check_output(owner: str, output: object, device: torch.device) -> None:
    """Raise `LossError` for an invalid output of `train_step`, which is on `device`."""
    loss = check_scalars(owner, "train_step", output)
    if loss.is_complex():
        raise LossError(
            f"{owner}.train_step: the loss is {loss.dtype}, and must be real. Return loss.abs() or loss.real."
        )
    if not loss.requires_grad:
        raise LossError(
            f"{owner}.train_step: the loss has no gradient. Compute it from self.model(...), without .detach() "
            "and outside of torch.no_grad()."
        )
    if loss.device != device and loss.device.type != device.type:  # the first comparison is the faster one
        raise LossError(f"{owner}.train_step: the loss is on {loss.device}, and must be on {device}. Do not move it.")


def check_scalars(owner: str, step: str, output: object) -> torch.Tensor:
    """Return the loss in the output of a step, or raise `LossError` for an invalid one."""
    if not isinstance(output, StepOutput):
        hint = " To leave a batch out, return None from collate_fn." if output is None else ""
        name = type(output).__name__
        raise LossError(f"{owner}.{step} returned {name}: it must return StepOutput(loss=..., outputs=...).{hint}")
    loss: object = output.loss
    if not isinstance(loss, torch.Tensor):
        advice = "Do not call .item()." if loss is not None else "Does the batch have the labels that the model needs?"
        raise LossError(f"{owner}.{step}: the loss {_describe(loss)}, and must be a scalar tensor. {advice}")
    if loss.dim() != 0:
        raise LossError(
            f"{owner}.{step}: the loss {_describe(loss)}, and must be a scalar tensor: the mean over the batch's "
            'items. Use reduction="mean", or loss.mean(). (Are the loss and the outputs swapped?)'
        )
    logged: Mapping[str, object] = output.logged
    for name, value in logged.items():
        if not isinstance(value, torch.Tensor) or value.dim() != 0:
            raise LossError(
                f"{owner}.{step}: logged[{name!r}] {_describe(value)}, and must be a scalar tensor: a mean over the "
                "batch's items."
            )
    return loss


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"has the shape {tuple(value.shape)}"
    return f"is of type {type(value).__name__}"


def check_logged(owner: str, values: Mapping[str, object]) -> None:
    """Raise `OptionError` for logged values that are not scalars, or have a name that every run reports."""
    for name, value in values.items():
        is_scalar = isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.numel() == 1)
        if not is_scalar:
            raise OptionError(
                f"{owner}.log({{{name!r}: {value_text(value)}}}): must be a number or a tensor with one element."
            )
        if name in REPORTED_NAMES:
            raise OptionError(f"{owner}.log({{{name!r}: ...}}): every run reports a value of this name already.")


def check_monitor(monitor: Monitor, names: ValueNames, owner: object, option: str = "monitor") -> None:
    """Raise `MonitorError` for a monitor whose value the run cannot report."""
    if not names.allow(monitor.name):
        raise_unreported(monitor, names.declared, owner, option)


def raise_unreported(monitor: Monitor, known: Collection[str], owner: object, option: str = "monitor") -> NoReturn:
    """Raise `MonitorError` for a monitor whose value is not among the reported ones."""
    has_evaluation = any(name == "eval_loss" or name.endswith("/loss") for name in known)
    hint = did_you_mean(monitor.name, known) if has_evaluation else "No eval_dataset was given. "
    raise MonitorError(
        f"{type(owner).__name__}({option}={monitor.name!r}): no such value is reported. {hint}"
        f"Reported values: {', '.join(sorted(known))}."
    )
