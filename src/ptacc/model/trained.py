"""Which parameters of a module are trained."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from ptacc.model.state_dict import canonical_name


def trained_names(module: nn.Module, optimizers: Iterable[Optimizer]) -> frozenset[str]:
    """Return the canonical names of the parameters that an optimizer has, or that require a gradient.

    The others are frozen. A parameter that is frozen at present, but is in an optimizer, may have been trained before.
    A tied parameter has several names.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    named = module.named_parameters(remove_duplicate=False)
    return frozenset(canonical_name(name) for name, p in named if p.requires_grad or id(p) in held)
