"""States of a trainer that its checkpoints do not contain."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

from ptacc.composition.fields import own_annotations
from ptacc.core.hooks import TrainerCore
from ptacc.types.protocols import Stateful


def warn_of_unsaved_states(trainer: TrainerCore) -> None:
    """Warn of each state of a trainer within a run that checkpoints will not contain.

    Warns:
        UserWarning: A mixin or the trainer's class has such a state, and does not declare that it need not be saved.
    """
    if unsaved := list(_unsaved_states(trainer)):
        warnings.warn(
            f"{type(trainer).__name__}: checkpoints will not contain {', '.join(unsaved)}, so a resumed run may differ "
            "from an uninterrupted one. To save a value, store it in self.run under a StateKey, in an object with "
            "state_dict() and load_state_dict(). If it need not be saved, declare that: StateKey(..., saved=False), "
            'or field(init=False, metadata={"saved": False}).',
            stacklevel=2,
        )


def _unsaved_states(trainer: TrainerCore) -> Iterator[str]:
    for key, state in trainer.run.states():
        if key.saved and not isinstance(state, Stateful):
            yield f"the state {key.name!r}, a {type(state).__name__}"
    fields: dict[str, dataclasses.Field[Any]] = {field.name: field for field in dataclasses.fields(trainer)}
    for name in {**fields, **vars(trainer)}:
        field = fields.get(name)
        is_declared = field is not None and (field.init or not field.metadata.get("saved", True))
        if not is_declared and not _is_own(type(trainer), name):
            yield f"the attribute {name!r}"
    for callback in trainer.all_callbacks():
        methods = {name for name in ("state_dict", "load_state_dict") if hasattr(callback, name)}
        if len(methods) == 1:
            yield f"the state of {type(callback).__name__}, which has only {methods.pop()}()"


def _is_own(cls: type, name: str) -> bool:
    """Return whether ptacc declares an attribute, or a method or property of the class has its name."""
    member = inspect.getattr_static(cls, name, None)
    if name == "_given_options" or callable(member) or isinstance(member, functools.cached_property):
        return True
    owner = next((base for base in cls.__mro__ if name in own_annotations(base)), None)
    return owner is not None and owner.__module__.partition(".")[0] == "ptacc"
