"""Checks of what users hand over, each made before any weight has changed."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import LBFGS

from ptacc.engines.base import OptimizerSlot
from ptacc.errors import LossError, ModelError, MonitorError, OptionError
from ptacc.types.monitor import Monitor
from ptacc.types.outputs import StepOutput
from ptacc.validation import did_you_mean, value_text


def check_not_wrapped(owner: str, model: nn.Module) -> None:
    """Raise `ModelError` for a model that is wrapped already."""
    marks = ("_orig_mod", "_fsdp_wrapped_module")  # what torch.compile and FSDP keep the bare model under
    if isinstance(model, DistributedDataParallel | DataParallel) or any(hasattr(model, mark) for mark in marks):
        raise ModelError(
            f"{owner}(model={type(model).__name__}(...)): the model is wrapped already. Give the bare model: wrapping "
            "and compiling are done for each run and undone after it."
        )


def check_trainable(owner: str, model: nn.Module, slots: Sequence[OptimizerSlot]) -> None:
    """Raise `ModelError` for a model and optimizers that cannot be trained as given.

    Warns:
        UserWarning: The model has trainable parameters that no optimizer holds.
    """
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    held = [parameter for slot in slots for parameter in slot.parameters]
    if strangers := sum(id(parameter) not in own for parameter in held):
        raise ModelError(
            f"{owner}: the optimizer holds {strangers} of {len(held)} parameters that the model does not have. "
            "Make it from this model's: `SGD(model.parameters(), ...)`, after the last layer was replaced."
        )
    if not any(parameter.requires_grad for parameter in held):
        raise ModelError(
            f"{owner}: nothing is trainable: none of the optimizer's {len(held)} parameters has requires_grad=True."
        )
    if any(isinstance(slot.optimizer, LBFGS) for slot in slots):
        raise ModelError(f"{owner}: LBFGS steps by a closure, which the loop does not give. Use another optimizer.")
    ids = {id(parameter) for parameter in held}
    left_out = [own[id(p)] for p in model.parameters() if p.requires_grad and id(p) not in ids]
    if left_out:
        warnings.warn(
            f"{owner}: {len(left_out)} trainable parameters are in no optimizer and will not change: "
            f"{', '.join(left_out[:3])}{', ...' if len(left_out) > 3 else ''}. Set requires_grad=False on them.",
            stacklevel=4,
        )


def check_callbacks(owner: str, callbacks: Iterable[object] | object, base: type) -> None:
    """Raise `OptionError` for what is no instance of `base` in a list of callbacks, or for no list at all."""
    if not isinstance(callbacks, Iterable):
        raise OptionError(
            f"{owner}(callbacks={value_text(callbacks)}): must be a list of callbacks. Write `callbacks=[...]`, also "
            "for a single one, and leave it out for none."
        )
    for callback in callbacks:
        if isinstance(callback, type):
            raise OptionError(
                f"{owner}(callbacks=[{callback.__name__}]): this is the class. Give an instance: {callback.__name__}()."
            )
        if not isinstance(callback, base):
            raise OptionError(f"{owner}(callbacks=[...]): {callback!r} is no callback. Derive its class from Callback.")


def check_output(owner: str, output: object, device: torch.device) -> None:
    """Raise `LossError` for the output of a training step that cannot be minimised."""
    if not isinstance(output, StepOutput):
        raise LossError(
            f"{owner}.train_step returned {type(output).__name__}: it must return StepOutput(loss=..., outputs=...)."
        )
    loss = output.loss
    if not isinstance(loss, torch.Tensor):
        raise LossError(
            f"{owner}.train_step: the loss is a {type(loss).__name__}, without a graph. Return the tensor: no .item()."
        )
    if loss.dim() != 0:
        raise LossError(
            f"{owner}.train_step: the loss has the shape {tuple(loss.shape)}, and must be a scalar: the mean over the "
            'batch\'s items. Use reduction="mean", or loss.mean(). (Are loss and outputs swapped?)'
        )
    if loss.is_complex():
        raise LossError(
            f"{owner}.train_step: the loss is {loss.dtype}, and only a real number can be minimised. Return loss.abs() "
            "or loss.real."
        )
    if not loss.requires_grad:
        raise LossError(
            f"{owner}.train_step: the loss has no gradient. Compute it from self.model(...), with no .detach() and no "
            "torch.no_grad() around it."
        )
    if loss.device.type != device.type:
        raise LossError(
            f"{owner}.train_step: the loss lies on {loss.device}, and the run on {device}. Leave it where the model "
            "computed it."
        )
    logged: Mapping[str, object] = output.logged
    for name, value in logged.items():
        if not isinstance(value, torch.Tensor) or value.dim() != 0:
            shape = f"has the shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else "is no tensor"
            raise LossError(
                f"{owner}.train_step: logged[{name!r}] {shape}, and must be a scalar tensor: a mean over the batch's "
                "items."
            )


def check_eval_output(owner: str, output: object) -> None:
    """Raise `LossError` for the output of an evaluation step that cannot be averaged."""
    if not isinstance(output, StepOutput):
        raise LossError(
            f"{owner}.eval_step returned {type(output).__name__}: it must return StepOutput(loss=..., outputs=...)."
        )
    loss: object = output.loss
    if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
        shape = f"has the shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else "is no tensor"
        raise LossError(
            f"{owner}.eval_step: the loss {shape}, and must be a scalar tensor: the mean over the batch's items."
        )


def check_monitor(monitored: Monitor, known: Collection[str], owner: object, option: str = "monitor") -> None:
    """Raise `MonitorError` where nobody reports the value, with the names that exist."""
    if monitored.name in known:
        return
    is_evaluated = any(name == "eval_loss" or name.endswith("/loss") for name in known)
    hint = (
        did_you_mean(monitored.name, known) if is_evaluated else "No eval_dataset was given, so nothing is evaluated. "
    )
    raise MonitorError(
        f"{type(owner).__name__}({option}={monitored.name!r}): nobody reports this value. {hint}"
        f"There are: {', '.join(sorted(known))}."
    )
