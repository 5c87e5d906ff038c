"""The parts that a user gives a trainer: the model, the data, the optimizer and the loss."""

from __future__ import annotations

from types import FunctionType

import torch
from torch import nn
from torch.nn.modules.loss import _Loss
from torch.optim import Optimizer

from ptacc.eject.copying import Copies, NotCopiedError, copy_function
from ptacc.eject.fragment import Target
from ptacc.eject.literals import call
from ptacc.eject.template import LOSS_FUNC, MAKE_PARTS
from ptacc.errors import OptionError
from ptacc.model.optimizer_dict import OptimizerDict
from ptacc.trainers.supervised import Trainer
from ptacc.validation import value_text


def make_parts(target: Target) -> str:
    """Return the functions that make the model, the optimizer and the data. Most are for the user to write.

    Raises:
        OptionError: The trainer has several optimizers.
    """
    model = optimizer = ""
    make_optimizer = 'raise NotImplementedError("write make_optimizer")'
    if target.trainer is not None:
        model = f": {type(target.trainer.unwrapped_model).__name__} in the trainer"
        own = target.trainer.optimizer
        if isinstance(own, OptimizerDict):
            if len(own) > 1:
                raise OptionError(f"{target.name} cannot be ejected: it has the optimizers {', '.join(own)}.")
            own = own[next(iter(own))]
        source = optimizer_source(own, target.trainer.unwrapped_model)
        make_optimizer = f"return {source}" if source else make_optimizer
        optimizer = "" if source else f": {type(own).__name__} in the trainer"
    return MAKE_PARTS.format(model=model, optimizer=optimizer, make_optimizer=make_optimizer)


def optimizer_source(optimizer: Optimizer, model: nn.Module) -> str | None:
    """Return the source of a new optimizer of torch for all parameters of a model; None for any other one."""
    kind, (group, *others) = type(optimizer), optimizer.param_groups
    of_model = list(map(id, model.parameters()))
    if others or getattr(torch.optim, kind.__name__, None) is not kind or list(map(id, group["params"])) != of_model:
        return None
    return call(f"torch.optim.{kind.__name__}", kind, group, "model.parameters()")


def make_loss(target: Target) -> Copies:
    """Return the loss function, or one for the user to write."""
    if target.trainer is None or not isinstance(target.trainer, Trainer):
        return Copies({"loss_func": LOSS_FUNC.format(loss="")})
    loss = target.trainer.loss_func
    source = None
    if isinstance(loss, _Loss) and getattr(nn, type(loss).__name__, None) is type(loss):
        source = call(f"nn.{type(loss).__name__}", type(loss), vars(loss) | dict(loss.named_buffers()))
    elif isinstance(loss, FunctionType) and getattr(nn.functional, loss.__name__, None) is loss:
        source = f"nn.functional.{loss.__name__}"
    if source is not None:
        return Copies({"loss_func": f"loss_func = {source}\n"})
    try:
        return copy_function(loss, "loss_func")
    except NotCopiedError:
        return Copies({"loss_func": LOSS_FUNC.format(loss=f": {value_text(loss)} in the trainer")})
