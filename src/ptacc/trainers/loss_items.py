"""What torch's losses are means over: for losses of class indices, the targets they do not ignore, with weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASS_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss, functional.cross_entropy, functional.nll_loss)
ELEMENTWISE_LOSSES = (
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.PoissonNLLLoss, nn.KLDivLoss),
    *(functional.mse_loss, functional.l1_loss, functional.smooth_l1_loss, functional.huber_loss),
    *(functional.poisson_nll_loss, functional.kl_div),
)
"""Losses that compare outputs and targets element by element, and broadcast them if their shapes differ."""
TORCH_LOSSES = nn.CrossEntropyLoss.__module__
OPTIONS: dict[str, Any] = {"reduction": "mean", "weight": None, "ignore_index": -100}
"""Options that determine what a loss is a mean over, with torch's defaults."""
FEW = 1024
"""Number of targets below which Python reads them faster than torch."""


class LossItems:
    """Counts the items that a loss is a mean over.

    Args:
        loss_func: Any loss. Torch's modules and functions are known, `partial`s of functions, and classes that inherit
            the `forward` of one of torch's.

    Attributes:
        reduction: The reduction of a known loss. Other losses are taken for means.
        ignored: The target that the loss ignores, -100 unless it says otherwise.
        is_selective: Whether a known loss gives classes weights, or ignores one of them.
        is_undetermined: Whether a class derived from one of torch's has options that change what torch's is a mean
            over, and a `forward` of its own, which may use them in another way.
        is_elementwise: Whether the loss is one of `ELEMENTWISE_LOSSES`.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html
    """

    def __init__(self, loss_func: object) -> None:
        self.loss_func = loss_func
        function, options = resolve_loss(loss_func)
        is_own = isinstance(function, type) and function.__module__ != TORCH_LOSSES
        self.reduction: str = "mean" if is_own else options["reduction"]
        self._has_classes = function in CLASS_LOSSES
        self.is_elementwise: bool = function in ELEMENTWISE_LOSSES
        self._options, ignored = options, options["ignore_index"]
        self.ignored: int = ignored if isinstance(ignored, int) else OPTIONS["ignore_index"]
        selects = options["weight"] is not None or self.ignored >= 0
        self.is_selective: bool = self._has_classes and selects
        self.is_undetermined: bool = is_own and (selects or options["reduction"] == "sum")
        self._weights: tuple[Tensor, int, Tensor] | None = None

    def class_indices(self, batch: object) -> Tensor | None:
        """Return the targets of a batch if its loss is a mean over them. Of probabilities, it is one over samples."""
        if not self._has_classes or not isinstance(batch, tuple | list) or len(batch) != 2:
            return None
        targets = batch[1]
        if not isinstance(targets, Tensor) or not targets.dim() or targets.is_floating_point():
            return None
        return targets

    def are_samples(self, batch: object) -> bool:
        """Return whether the items of a batch are its samples, unless the loss ignores some of them."""
        return not self.is_selective and ((targets := self.class_indices(batch)) is None or targets.dim() == 1)

    def count(self, batch: object) -> float | None:
        """Return the number of targets that the loss does not ignore, or the sum of their weights; None if unknown.

        Targets on an accelerator are read only if each sample has several, or if the loss is selective.
        """
        if (targets := self.class_indices(batch)) is None:
            return None
        if not self.is_selective and targets.dim() == 1 and not contains(targets, self.ignored):
            return targets.numel()
        is_counted = targets != self.ignored
        if self._options["weight"] is None:
            return int(is_counted.sum())
        return float(self._host_weights().to(targets.device)[targets[is_counted]].sum(dtype=torch.float64))

    def _host_weights(self) -> Tensor:
        """Return the weights on the host, where they are copied again only after they changed."""
        module = self.loss_func if isinstance(self.loss_func, nn.CrossEntropyLoss | nn.NLLLoss) else None
        weight: Tensor = self._options["weight"] if module is None or module.weight is None else module.weight
        known = self._weights
        if known is None or known[0] is not weight or known[1] != weight._version:  # noqa: SLF001
            self._weights = known = (weight, weight._version, weight.detach().cpu())  # noqa: SLF001
        return known[2]


def contains(targets: Tensor, value: int) -> bool:
    """Return whether a vector on the host contains a value. One on a device is not read."""
    if not targets.is_cpu:
        return False
    if targets.numel() < FEW:
        return value in targets.tolist()  # half the time of a tensor operation
    return bool((targets == value).any())


def resolve_loss(loss_func: object) -> tuple[object, dict[str, Any]]:
    """Return the function of a loss, or the class whose `forward` it has, and its `OPTIONS` if it is one of torch's.

    Example:
        >>> function, options = resolve_loss(functools.partial(functional.mse_loss, reduction="sum"))
        >>> function.__name__, options["reduction"]
        ('mse_loss', 'sum')
    """
    if isinstance(loss_func, functools.partial):
        function, options = resolve_loss(loss_func.func)
        return function, options | {name: value for name, value in loss_func.keywords.items() if name in options}
    if not isinstance(loss_func, nn.Module):
        return loss_func, dict(OPTIONS)
    classes = type(loss_func).__mro__
    options = dict(OPTIONS)
    if any(base.__module__ == TORCH_LOSSES for base in classes):
        options["reduction"] = getattr(loss_func, "reduction", "mean")
    if isinstance(loss_func, nn.CrossEntropyLoss | nn.NLLLoss):
        options |= {"weight": loss_func.weight, "ignore_index": loss_func.ignore_index}
    return next(base for base in classes if "forward" in vars(base)), options
