"""Patches: modules whose `forward` is another one for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from torch import nn
from typing_extensions import TypeVar, override

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Forward: TypeAlias = Callable[..., Any]


class Patch:
    """A forward in the place of another. Copies and pickles of the module have the other one back.

    They belong to no run, and a closure would bind them to the weights of the module that they were made of.
    """

    def __init__(self, replaced: Forward, forward: Forward) -> None:
        """Call `forward`, and be `replaced` in copies."""
        self._replaced, self._forward = replaced, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the forward."""
        return self._forward(*args, **kwargs)

    @override
    def __reduce__(self) -> tuple[Callable[[Forward], Forward], tuple[Forward]]:
        """Copy the forward that this one stands for."""
        return _as_is, (self._replaced,)


@contextlib.contextmanager
def patched_forwards(modules: Iterable[ModuleT], patch: Callable[[ModuleT, Forward], Forward]) -> Iterator[None]:
    """Patch modules for the block; at its end each has the attributes that it had.

    Calls of the modules see the patch, also within wrappers such as `DistributedDataParallel`.

    Args:
        modules: The modules, each once.
        patch: Returns the new forward of a module, given the module and its present forward.
    """
    with contextlib.ExitStack() as undoing:
        for module in modules:
            own = {name: value for name, value in vars(module).items() if name == "forward"}
            undoing.callback(_put_back, module, own)
            vars(module)["forward"] = Patch(module.forward, patch(module, module.forward))
        yield


def _put_back(module: nn.Module, own: dict[str, Any]) -> None:
    vars(module).pop("forward", None)
    vars(module).update(own)


def _as_is(forward: Forward) -> Forward:
    return forward
