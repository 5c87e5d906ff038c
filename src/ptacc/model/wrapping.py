"""What is remembered of a model before it is wrapped, and how it is restored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class ModelState:
    """What a run may change of a user's model beside its weights, to be put back at its end."""

    training: tuple[tuple[nn.Module, bool], ...]
    patched: Mapping[str, object]
    syncing: tuple[DistributedDataParallel, bool] | None = None

    PATCHES = ("forward", "_original_forward", "_is_accelerate_prepared")

    @classmethod
    def capture(cls, model: nn.Module) -> ModelState:
        """Remember the state of `model`."""
        patched = {name: model.__dict__[name] for name in cls.PATCHES if name in model.__dict__}
        replica = find_ddp_module(model)
        syncing = None if replica is None else (replica, replica.require_forward_param_sync)
        return cls(tuple((module, module.training) for module in model.modules()), patched, syncing)

    def restore_flags(self) -> None:
        """Put each module's train flag back, and whether the next forward pass gives all processes rank 0's buffers.

        A forward pass without gradients takes that away from the one after it.
        """
        for module, training in self.training:
            module.training = training
        if self.syncing is not None:
            self.syncing[0].require_forward_param_sync = self.syncing[1]

    def restore(self, model: nn.Module) -> None:
        """Put everything back."""
        for name in self.PATCHES:
            model.__dict__.pop(name, None)
        model.__dict__.update(self.patched)
        self.restore_flags()


def find_ddp_module(model: nn.Module) -> DistributedDataParallel | None:
    """Return the wrapper that averages gradients over the processes, be it compiled or not; None without one."""
    inner = model if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, DistributedDataParallel) else None
