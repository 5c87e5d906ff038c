"""Checks at the end of a window that the gradients of all trained parameters were averaged over the ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from ptacc.engines.base import OptimizerSlot, all_parameters
from ptacc.errors import ModelError
from ptacc.validation import list_some

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer types by their size in bytes."""


class ReductionCheck:
    """Raises `ModelError`, before the update, for parameters whose gradients the engine does not average.

    A parameter must not require a gradient if it did not when the engine wrapped the model. With DDP, the gradients of
    all ranks are compared in the windows 1, 4, 16, 64, ... of a run: averaged gradients are equal to the bit, since
    each entry is computed once and sent to all ranks. Other gradients are of the rank's own batches.

    Args:
        model: The user's model.
        slots: The optimizers.
        ddp: The DDP wrapper; None if the engine averages gradients itself.
    """

    def __init__(
        self, model: nn.Module, slots: Sequence[OptimizerSlot], ddp: DistributedDataParallel | None = None
    ) -> None:
        self._model, self._slots, self._ddp = model, slots, ddp
        self._frozen = [parameter for parameter in all_parameters(slots) if not parameter.requires_grad]
        self._windows, self._next = 0, 1

    def check(self) -> None:
        """Check the gradients of a window. If a comparison is due, a collective that reads from the device.

        Raises:
            ModelError: A parameter was unfrozen, or its gradients differ. For the latter, raised on all ranks.
        """
        if unfrozen := [parameter for parameter in self._frozen if parameter.requires_grad]:
            raise ModelError(
                f"{join_names(self._model, unfrozen)} required no gradient when the run began, and requires one now. "
                "DistributedDataParallel and DeepSpeed do not average its gradient over the processes. Set "
                "requires_grad before train(), or leave DDPMixin and DeepSpeedMixin out: without them, parameters may "
                "be unfrozen at any time."
            )
        if self._ddp is None:
            return
        # DDP itself checks for unused parameters in its next forward pass only: after the update.
        self._ddp._check_reducer_finalized()  # type: ignore[no-untyped-call]  # noqa: SLF001
        self._windows += 1
        if self._windows < self._next:
            return
        self._next *= 4
        if different := find_differences(all_parameters(self._slots)):
            raise ModelError(
                f"The processes have different gradients of {join_names(self._model, different)}, so that they would "
                "train different weights. DDP averages the gradients of the first backward pass of a batch, for the "
                "parameters that the model had when the run began. Call super().backward(loss) in an override of "
                "backward, and do not compute gradients a second time for the same batch."
            )


def find_differences(parameters: Sequence[Parameter]) -> list[Parameter]:
    """Return the parameters whose gradients are not equal to the bit on all ranks. A collective."""
    sums = torch.stack([sum_bits(parameter.grad, parameter.device) for parameter in parameters])
    extremes = torch.cat([sums, ~sums])  # the largest ~x is that of the smallest x
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    largest, smallest = extremes[: len(sums)], ~extremes[len(sums) :]
    return [parameter for parameter, differs in zip(parameters, (largest != smallest).tolist(), strict=True) if differs]


def sum_bits(gradient: Tensor | None, device: torch.device) -> Tensor:
    """Return the sum of a gradient's entries, read as integers: a scalar that any change of a bit changes.

    Unlike a sum of floats it does not depend on the order of the entries, and so not on the kernel.
    """
    if gradient is None:
        return torch.zeros((), dtype=torch.int64, device=device)
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    real = torch.view_as_real(values) if values.is_complex() else values
    return real.detach().contiguous().view(INTEGERS[real.element_size()]).sum(dtype=torch.int64)


def join_names(model: nn.Module, parameters: Sequence[Parameter]) -> str:
    """Return the names of the first parameters of a list, for an error message."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return list_some([names.get(parameter, "a parameter outside of the model") for parameter in parameters])
