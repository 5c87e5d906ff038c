"""A user's model as it was before DeepSpeed had it, and how it becomes that again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ptacc.engines.common import remove_hooks

DEEPSPEED = ("deepspeed",)
"""The package whose hooks a model carries meanwhile."""
LAZY_ATTRIBUTES = ("ds_", "_ds_", "_z3_", "applied_pre_backward")
"""How names begin of what DeepSpeed notes in a model as late as in its first forward pass."""


@dataclass(frozen=True)
class ParameterLocation:
    """Where a parameter was."""

    dtype: torch.dtype
    device: torch.device


@dataclass
class OriginalModel:
    """What DeepSpeed changes of a model beside its weights, to be put back.

    Args:
        model: The user's model, which nothing has wrapped yet.
    """

    model: nn.Module
    _names: Mapping[object, frozenset[str]] = field(init=False)
    _places: Mapping[Parameter, ParameterLocation] = field(init=False)
    _buffers: Mapping[str, torch.device] = field(init=False)
    _tables: Mapping[nn.Module, dict[str, Parameter | None]] = field(init=False)
    _added: Mapping[object, frozenset[str]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._names = {part: frozenset(vars(part)) for part in self._parts()}
        self._places = {p: ParameterLocation(p.dtype, p.device) for p in self.model.parameters()}
        self._buffers = {name: buffer.device for name, buffer in self.model.named_buffers()}
        self._tables = {module: module._parameters for module in self.model.modules()}  # noqa: SLF001

    def original_device(self, parameter: Parameter) -> torch.device:
        """Return the device that a parameter was on."""
        return self._places[parameter].device

    def record_added_attributes(self) -> None:
        """Take what has come to the model since it was bare for DeepSpeed's: what comes later is the user's own."""
        self._added = {part: frozenset(vars(part)) - self._names[part] for part in self._parts()}

    @torch.no_grad()
    def restore(self, whole: Callable[[Parameter], Tensor]) -> None:
        """Put everything back, and give each parameter its whole tensor. A collective: one tensor at a time.

        Args:
            whole: Returns the tensor of a parameter. All processes call it in the same order.
        """
        for parameter, place in self._places.items():
            tensor = whole(parameter).detach().to(place.device, place.dtype, copy=True)
            parameter.data, parameter.grad = tensor, None
            self._strip(parameter)
        for module, table in self._tables.items():
            table.update(vars(module)["_parameters"])
            self._strip(module)
            vars(module)["_parameters"] = table
            remove_hooks(module, DEEPSPEED)
        for name, buffer in self.model.named_buffers():
            buffer.data = buffer.data.to(self._buffers[name])

    def _strip(self, part: object) -> None:
        names = vars(part)
        later = {name for name in names if name.startswith(LAZY_ATTRIBUTES)} - self._names[part]
        for name in self._added.get(part, frozenset()) | later:
            names.pop(name, None)

    def _parts(self) -> tuple[object, ...]:
        return (*self.model.modules(), *self.model.parameters())
