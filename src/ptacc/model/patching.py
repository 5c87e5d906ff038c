"""Temporary replacement of methods, such as modules' `forward`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeAlias

from torch import nn
from typing_extensions import TypeVar, override

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Forward: TypeAlias = Callable[..., Any]


class Patch:
    """A function that stands for another one. Copies and pickles of it contain the original function instead.

    A copied module must not run the patch: the patch belongs to a run, and is bound to the weights of one module.
    """

    def __init__(self, original: Forward, replacement: Forward) -> None:
        """Replace `original` by `replacement`."""
        self._original, self._replacement = original, replacement

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the replacement."""
        return self._replacement(*args, **kwargs)

    @override
    def __reduce__(self) -> tuple[Callable[[Forward], Forward], tuple[Forward]]:
        return _identity, (self._original,)


@contextlib.contextmanager
def patched(owner: object, name: str, replacement: Callable[..., Any]) -> Generator[None]:
    """Replace a method of an object for the block, then restore the object's attributes."""
    original, attributes = getattr(owner, name), vars(owner)
    own = {name: attributes[name]} if name in attributes else {}
    attributes[name] = Patch(original, replacement)
    try:
        yield
    finally:
        attributes.pop(name, None)
        attributes.update(own)


@contextlib.contextmanager
def patched_forwards(modules: Iterable[ModuleT], patch: Callable[[ModuleT, Forward], Forward]) -> Generator[None]:
    """Patch the forwards of modules for the block, then restore their attributes.

    Calls of the modules use the patch, also within wrappers such as `DistributedDataParallel`. `patch` returns the new
    forward of a module, given the module and its present forward.
    """
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(patched(module, "forward", patch(module, module.forward)))
        yield


def _identity(function: Forward) -> Forward:
    return function
