"""Gradients: clipping, and leaving out those that a step must not count."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable

from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_


@contextlib.contextmanager
def preserved_gradients(model: nn.Module) -> Generator[None]:
    """Set the gradients of a model aside for a block that may compute its own."""
    saved = [(parameter, parameter.grad) for parameter in model.parameters()]
    discard_gradients(model)
    try:
        yield
    finally:
        for parameter, gradient in saved:
            parameter.grad = gradient


def discard_gradients(model: nn.Module) -> None:
    """Set the gradients of all parameters to None."""
    for parameter in model.parameters():
        parameter.grad = None


def clip_known_norm(parameters: Iterable[Parameter], max_norm: float | Tensor, norm: Tensor) -> None:
    """Scale gradients whose norm is known to one of at most `max_norm`. A limit on the device is not read."""
    if isinstance(max_norm, Tensor):
        max_norm, norm = 1.0, norm / max_norm  # torch calls float(max_norm)
    clip_grads_with_norm_(parameters, max_norm, norm)
