"""The states of modules among a trainer's options, such as a loss function with buffers, or a teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from ptacc.core.hooks import TrainerCore
from ptacc.model.joined_modules import PLACE
from ptacc.model.option_modules import find_option_modules
from ptacc.model.state_dict import (
    canonical_name,
    drop_misfits,
    get_weights,
    load_non_persistent_buffers,
    load_weights,
    non_persistent_buffers,
)
from ptacc.serialization.safetensors_file import is_storable
from ptacc.types.protocols import MetricLike, StateDict


def module_options(trainer: TrainerCore) -> dict[str, nn.Module]:
    """Return the modules among a trainer's options by their places, without the model and without metrics."""
    models = (trainer.model, trainer.unwrapped_model)
    return {
        place: module
        for place, module in find_option_modules(trainer).items()
        if not any(module is model for model in models) and not isinstance(module, MetricLike)
    }


def option_states(trainer: TrainerCore, *, each_rank: bool) -> dict[str, StateDict]:
    """Return the tensors of each module: its parameters, or its buffers, which may differ between ranks.

    Modules in an option with the metadata `{"saved": False}` are left out.
    """
    unsaved = {field.name for field in dataclasses.fields(trainer) if not field.metadata.get("saved", True)}
    states: dict[str, StateDict] = {}
    for option, module in module_options(trainer).items():
        if option.partition(".")[0] in unsaved:
            continue
        parameters = parameters_of(module)
        tensors = {**get_weights(module), **non_persistent_buffers(module)}
        states[option] = {
            name: value for name, value in tensors.items() if (name in parameters) != each_rank and is_storable(value)
        }
    return {option: state for option, state in states.items() if state}


def merge_options(shared: Mapping[str, StateDict], own: Mapping[str, StateDict]) -> dict[str, StateDict]:
    """Merge the tensors of each module that all ranks share with those of one rank."""
    return {option: {**shared.get(option, {}), **own.get(option, {})} for option in {**shared, **own}}


def find_misfits(trainer: TrainerCore, saved: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Return the names, as in an optimizer's state, of saved tensors with another shape than the module's."""
    present = {option: get_weights(module) for option, module in module_options(trainer).items()}
    return {
        f"{PLACE}{option}.{name}"
        for option, state in saved.items()
        for name in state.keys() - drop_misfits(present.get(option, {}), state).keys()
    }


def parameters_of(module: nn.Module) -> StateDict:
    """Return the parameters of a module, as `state_dict()` has them."""
    names = {canonical_name(name) for name, _ in module.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in get_weights(module).items() if name in names}


def load_option_states(trainer: TrainerCore, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Restore the tensors of each module. Those that a module does not have, or with another shape, are left out."""
    for option, module in module_options(trainer).items():
        state, present = saved.get(option, {}), get_weights(module)
        load_weights(module, drop_misfits(present, {n: v for n, v in state.items() if n in present}), strict=False)
        load_non_persistent_buffers(module, {name: value for name, value in state.items() if name not in present})
