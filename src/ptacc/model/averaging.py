"""Averages of a model's weights, kept beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ptacc.tensors.dtensor import full_tensor, match_placement


class AveragedWeights:
    """A running average of a model's floating tensors, parameters and buffers; other tensors follow the model as is.

    Averages are kept in the dtype of what they average, and moved by a few foreach kernels, not one a tensor.
    """

    def __init__(self, model: nn.Module) -> None:
        """Start from the present weights of `model`, under its canonical names."""
        self.updates = 0
        self._is_applied = False
        self._averages = {name: tensor.detach().clone() for name, tensor in named_tensors(model)}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The averages by name."""
        return self._averages

    @torch.no_grad()
    def update(self, model: nn.Module, weight: float) -> None:
        """Move each average towards the model's present tensor by `weight`, from 0 to 1."""
        floating: tuple[list[Tensor], list[Tensor]] = ([], [])
        for name, tensor in named_tensors(model):
            if tensor.is_floating_point():
                floating[0].append(self._averages[name])
                floating[1].append(tensor.detach())
            else:
                self._averages[name].copy_(tensor)
        for averages, tensors in foreach_groups(*floating):
            # torch's own name for it has no public twin.
            torch._foreach_lerp_(averages, tensors, weight)  # pyright: ignore[reportPrivateImportUsage]
        self.updates += 1

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's tensors and the averages. Twice is nothing."""
        for name, tensor in named_tensors(model):
            raw = tensor.detach().clone()
            tensor.copy_(self._averages[name])
            self._averages[name].copy_(raw)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Have the averages in the model for the block, and for blocks within it."""
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
        """Take the model's present tensors for the averages."""
        for name, tensor in named_tensors(model):
            self._averages[name].copy_(tensor)

    @torch.no_grad()
    def unshard(self) -> None:
        """Have no average in shards, as the model is that it is of. A collective where one is."""
        self._averages = {name: full_tensor(average) for name, average in self._averages.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates and the averages."""
        return {"updates": self.updates, "averages": dict(self._averages)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of the same model."""
        self.updates = state_dict["updates"]
        for name, average in self._averages.items():
            average.copy_(match_placement(average, state_dict["averages"][name]))


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the parameters and the buffers of a model, each tensor once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def foreach_groups(left: list[Tensor], right: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Group pairs of tensors as foreach kernels want them: by their dtype, and the mesh that they are dealt over."""
    groups: dict[tuple[object, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for pair in zip(left, right, strict=True):
        group = groups.setdefault((pair[0].dtype, getattr(pair[0], "device_mesh", None)), ([], []))
        for tensors, tensor in zip(group, pair, strict=True):
            tensors.append(tensor)
    yield from groups.values()
