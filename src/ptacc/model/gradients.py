"""Gradients of a model that a step must not count: those of the user's own code, and those of an evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from torch import nn


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
