"""What the history file of a run holds of its trainer: options, arguments of `train()`, and where it is executed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ptacc.core.hooks import TrainerCore
from ptacc.loop.explain import option_rows, shorten
from ptacc.run.environment import describe_environment
from ptacc.tensors.structures import iterate_tensors
from ptacc.types.arguments import RunOptions

MAX_TEXT = 200
"""Characters of a value's text."""


def describe_run(trainer: TrainerCore, options: RunOptions) -> dict[str, Any]:
    """Return the description of a run, in values that JSON has."""
    given: Mapping[str, object] = {**options}
    model = trainer.unwrapped_model
    parameters = iterate_tensors([*model.parameters()])
    return {
        "trainer": type(trainer).__name__,
        "model": type(model).__name__,
        "parameters": sum(tensor.numel() for tensor in parameters if not is_lazy(tensor)),
        "options": describe_options(trainer),
        "arguments": {name: shorten(value)[:MAX_TEXT] for name, value in given.items() if value is not None},
        "monitors": [[monitor.name, monitor.mode] for _, monitor in trainer.monitors()],
        "environment": describe_environment(trainer.accelerator),
    }


def describe_options(trainer: TrainerCore) -> dict[str, list[str]]:
    """Return the text of each option with its origin. Those of optimizers have their settings."""
    options = {name: [text[:MAX_TEXT], origin] for name, text, origin in option_rows(trainer)}
    for slot in trainer.optimizer_slots():
        _, origin = options.get(slot.name, ["", "set by the trainer"])
        options[slot.name] = [describe_optimizer(slot.optimizer)[:MAX_TEXT], origin]
    return options


def describe_optimizer(optimizer: Optimizer) -> str:
    """Return the class of an optimizer with its default settings. Those that are off are left out.

    Example:
        >>> import torch
        >>> describe_optimizer(torch.optim.SGD([torch.zeros(1)], lr=0.1, weight_decay=0.01))
        'SGD(lr=0.1, weight_decay=0.01)'
    """
    settings = {name: value for name, value in optimizer.defaults.items() if isinstance(value, float | int | tuple)}
    text = ", ".join(f"{name}={value}" for name, value in settings.items() if value)
    return f"{type(optimizer).__name__}({text})"
