"""Which tensors of a trainer are trained, and fingerprints of the others, that show whether they have changed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ptacc.core.hooks import TrainerCore
from ptacc.model.state_dict import canonical_name, describe_tensor, is_placeholder
from ptacc.serialization.safetensors_file import is_storable
from ptacc.tensors.dtensor import full_tensor, is_dtensor
from ptacc.tensors.fingerprint import compute_fingerprint


def trained_names(module: nn.Module, optimizers: Iterable[Optimizer]) -> frozenset[str]:
    """Return the canonical names of the parameters that an optimizer has, or that require a gradient.

    The others are frozen. A parameter that is frozen at present, but is in an optimizer, may have been trained before.
    A tied parameter has several names.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    named = module.named_parameters(remove_duplicate=False)
    return frozenset(canonical_name(name) for name, p in named if p.requires_grad or id(p) in held)


def find_trained(trainer: TrainerCore) -> frozenset[str]:
    """Return the names of the model's parameters that are trained: see `trained_names`."""
    slots = trainer.run.engine.slots if trainer.is_running else trainer.optimizer_slots()
    return trained_names(trainer.unwrapped_model, (slot.optimizer for slot in slots))


def fingerprint_tensors(trainer: TrainerCore, tensors: Mapping[str, Any]) -> dict[str, str]:
    """Return the fingerprint, dtype and shape of each full tensor, by name. Values without data are left out.

    Rank 0 computes them. A collective, in which sharded tensors are gathered one by one.
    """
    is_main, found = trainer.distributed.rank == 0, dict[str, str]()
    for name, value in tensors.items():
        if is_storable(value) and not is_lazy(value) and (is_main or is_dtensor(value)):
            full = full_tensor(value)
            if is_main and not is_placeholder(full):
                found[name] = f"{describe_tensor(full)} {compute_fingerprint(full)}"
    return trainer.distributed.broadcast(found)


def without(state: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return a state without some names."""
    return {name: value for name, value in state.items() if name not in names}
