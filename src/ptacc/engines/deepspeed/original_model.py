"""A user's model as it was before DeepSpeed changed it, and how it is restored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ptacc.engines.common import AddedAttributes, remove_hooks

HOOK_PACKAGES = ("deepspeed",)
"""The package whose hooks a partitioned model has."""
LAZY_ATTRIBUTES = ("ds_", "_ds_", "_z3_", "applied_pre_backward")
"""Prefixes of the attributes that DeepSpeed adds as late as in the first forward pass."""


class OriginalModel:
    """Records what DeepSpeed changes in a model besides its weights, and undoes it."""

    def __init__(self, model: nn.Module) -> None:
        """Record the state of `model`, which DeepSpeed has not changed yet."""
        self._model = model
        self.devices = {parameter: parameter.device for parameter in model.parameters()}
        self._attributes = AddedAttributes((*model.modules(), *model.parameters()))
        self._buffer_devices = {name: buffer.device for name, buffer in model.named_buffers()}
        # ZeRO 3 replaces each module's dictionary of parameters by one that gathers them.
        self._parameters = {module: module._parameters for module in model.modules()}  # noqa: SLF001

    def record_added_attributes(self) -> None:
        """Take the attributes added so far as DeepSpeed's. Those added later are the user's."""
        self._attributes.record()

    @torch.no_grad()
    def restore(self, gather: Callable[[Parameter], Tensor]) -> None:
        """Restore the model, with its trained weights. A collective.

        Args:
            gather: Returns the full weight of a parameter: a collective, called in the same order on all ranks.
        """
        for parameter, device in self.devices.items():
            # `check_model` requires float32.
            parameter.data = gather(parameter).detach().to(device, torch.float32, copy=True)
            parameter.grad = None
            self._attributes.remove(parameter, LAZY_ATTRIBUTES)
        for module, parameters in self._parameters.items():
            parameters.update(vars(module)["_parameters"])
            self._attributes.remove(module, LAZY_ATTRIBUTES)
            vars(module)["_parameters"] = parameters
            remove_hooks(module, HOOK_PACKAGES)
        for name, buffer in self._model.named_buffers():
            buffer.data = buffer.data.to(self._buffer_devices[name])
