"""Training mode and eval mode of a model's modules.

A module may do something in `train(mode)`: a LoRA layer merges its weights, a backbone keeps its norm layers in eval
mode. So modes are changed by `train(mode)`, as in a loop of your own, and not by assignment to `training`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from torch import nn

Modes: TypeAlias = Sequence[tuple[nn.Module, bool]]
"""Each module of a model with whether it is in training mode. The model itself comes first, parents before children."""


def get_modes(model: nn.Module) -> Modes:
    """Return the present modes of a model."""
    return [(module, module.training) for module in model.modules()]


def set_modes(modes: Modes) -> None:
    """Call `train(mode)` of the model, and then of each submodule that has another mode than it should."""
    (model, is_training), *_ = modes
    model.train(is_training)
    for module, mode in modes:
        if module.training != mode:
            module.train(mode)
    for module, mode in modes:  # the `train` of some modules ignores the mode, or changes a module that has two parents
        module.training = mode


def start_training(model: nn.Module, before: Modes) -> None:
    """Put a model into training mode for a run.

    If the model was in training mode itself, its submodules that were in eval mode stay in eval mode. If it was in eval
    mode, as `from_pretrained` returns it, all of it is put into training mode. `before` has the modes of that time.
    """
    model.train()
    if before[0][1]:
        set_modes([(module, mode and module.training) for module, mode in before])


def find_eval_roots(model: nn.Module) -> Iterator[str]:
    """Yield the names of submodules in eval mode, without those within another one of them."""
    for name, child in model.named_children():
        if child.training:
            yield from (f"{name}.{inner}" for inner in find_eval_roots(child))
        else:
            yield name
