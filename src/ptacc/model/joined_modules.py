"""A model, and the modules outside of it that are trained with it, such as a loss with parameters, as one module."""

from __future__ import annotations

from collections.abc import Generator, Mapping

from torch import nn
from typing_extensions import override

PLACE = "options."
"""What the names of tensors outside of the model begin with: `options.loss_func.weight`."""


class JoinedModules(nn.Module):
    """The modules, parameters and buffers of a model and of modules outside of it, each once; the model's come first.

    Args:
        model: The model. Its tensors keep their names.
        others: The other modules by their places among a trainer's options.
    """

    def __init__(self, model: nn.Module, others: Mapping[str, nn.Module]) -> None:
        super().__init__()
        # In a dictionary they are not submodules, whose names would have a prefix.
        self._parts = {"": model, **add_places(others)}

    @override
    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Generator[tuple[str, nn.Module]]:
        seen: set[nn.Module] = set() if memo is None else memo
        for place, module in self._parts.items():
            yield from module.named_modules(seen, place, remove_duplicate)

    @override
    def train(self, mode: bool = True) -> JoinedModules:
        for module in self._parts.values():
            module.train(mode)
        return self


def join_modules(model: nn.Module, others: Mapping[str, nn.Module]) -> nn.Module:
    """Return a model joined with other modules, or the model itself if there are none."""
    return JoinedModules(model, others) if others else model


def add_places(others: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return modules outside of a model by the beginning of the names of their tensors."""
    return {f"{PLACE}{place}": module for place, module in others.items()}
