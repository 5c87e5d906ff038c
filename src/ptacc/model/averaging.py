"""Running averages of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ptacc.tensors.dtensor import full_tensor, match_placement


class AveragedWeights:
    """A running average of a model's floating parameters and buffers. Other tensors are copied from the model.

    Averages have the dtype and the placement of their tensors, and are updated by a few foreach kernels.
    """

    def __init__(self, model: nn.Module) -> None:
        """Start with a copy of the model's present tensors."""
        self.updates = 0
        self._is_applied = False
        self._averages = {name: tensor.detach().clone() for name, tensor in named_tensors(model)}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The averages by name."""
        return self._averages

    @torch.no_grad()
    def update(self, model: nn.Module, weight: float) -> None:
        """Move each average towards the model's present tensor by `weight`, in [0, 1]."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for name, tensor in named_tensors(model):
            if tensor.is_floating_point():
                pairs.append((self._averages[name], tensor.detach()))
            else:
                self._averages[name].copy_(tensor)
        for averages, tensors in foreach_groups(pairs):
            # torch has no public name for it.
            torch._foreach_lerp_(averages, tensors, weight)  # pyright: ignore[reportPrivateImportUsage]
        self.updates += 1

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Swap the model's tensors and the averages."""
        for name, tensor in named_tensors(model):
            present = tensor.detach().clone()
            tensor.copy_(self._averages[name])
            self._averages[name].copy_(present)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Swap the averages into the model for the block. Blocks within it change nothing."""
        if self._is_applied:
            yield
            return
        self.swap(model)
        self._is_applied = True
        try:
            yield
        finally:
            self._is_applied = False
            self.swap(model)

    @torch.no_grad()
    def copy_from(self, model: nn.Module) -> None:
        """Set the averages to the model's present tensors."""
        for name, tensor in named_tensors(model):
            self._averages[name].copy_(tensor)

    @torch.no_grad()
    def unshard(self) -> None:
        """Gather sharded averages. A collective if any average is sharded."""
        self._averages = {name: full_tensor(average) for name, average in self._averages.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates and the averages."""
        return {"updates": self.updates, "averages": dict(self._averages)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of averages of the same model."""
        self.updates = state_dict["updates"]
        for name, average in self._averages.items():
            average.copy_(match_placement(average, state_dict["averages"][name]))


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and the buffers of a model, each tensor once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def foreach_groups(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Group pairs of tensors by dtype and device mesh, as foreach kernels need them."""
    groups: dict[tuple[object, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for left, right in pairs:
        lefts, rights = groups.setdefault((left.dtype, getattr(left, "device_mesh", None)), ([], []))
        lefts.append(left)
        rights.append(right)
    yield from groups.values()
