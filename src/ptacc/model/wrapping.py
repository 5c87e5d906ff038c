"""What wrapping a model for a run changes in it, and how that is undone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

from torch import nn

from ptacc.model.modes import Modes, get_modes, set_modes
from ptacc.types.protocols import AcceleratorProtocol


class AutocastForward(NamedTuple):
    """A forward function that Accelerate replaced: by which accelerator, and with what."""

    accelerator: ref[AcceleratorProtocol]
    original: object
    patched: Any


_autocast_forwards: WeakKeyDictionary[nn.Module, AutocastForward] = WeakKeyDictionary()
call_contexts: WeakKeyDictionary[nn.Module, Callable[[], AbstractContextManager[None]]] = WeakKeyDictionary()
"""Models whose methods and submodules can be called in a context only, each with a function that makes one."""


def calling(model: nn.Module) -> AbstractContextManager[None]:
    """Return the context in which methods and submodules of a model can be called. Collective for sharded models."""
    make_context = call_contexts.get(model)
    return nullcontext() if make_context is None else make_context()


def prepare_model(accelerator: AcceleratorProtocol, model: nn.Module) -> nn.Module:
    """Prepare a model as Accelerate does, with the same forward function for autocast each time.

    Accelerate makes a new one in each call. `torch.compile` would compile it again, and after eight of them no more.
    """
    original = getattr(model.forward, "__func__", None)
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    patched = getattr(vars(model).get("forward"), "__func__", original)
    if original is None or patched is original:  # there is no autocast, or it is prepared already
        return prepared
    known = _autocast_forwards.get(model)
    if known is not None and known.accelerator() is accelerator and known.original is original:
        model.forward = MethodType(known.patched, model)
    else:
        _autocast_forwards[model] = AutocastForward(ref(accelerator), original, patched)
    return prepared


@dataclass(frozen=True)
class ModelState:
    """The state of a user's model that a run changes besides weights, and restores at its end.

    Args:
        modes: Each module with its mode.
        patched: The model's own attributes among those that Accelerate replaces.
    """

    modes: Modes
    patched: Mapping[str, object]

    PATCHES = ("forward", "_original_forward", "_is_accelerate_prepared")

    @classmethod
    def capture(cls, model: nn.Module) -> ModelState:
        """Record the state of `model`."""
        patched = {name: model.__dict__[name] for name in cls.PATCHES if name in model.__dict__}
        return cls(get_modes(model), patched)

    def restore(self, model: nn.Module) -> None:
        """Restore modes and attributes."""
        for name in self.PATCHES:
            model.__dict__.pop(name, None)
        model.__dict__.update(self.patched)
        set_modes(self.modes)
