"""Options: the annotated names of class bodies, how they are inherited, and what no type checker sees wrong in them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, InitVar
from typing import Any, ClassVar, ForwardRef, get_origin

from torch import nn
from typing_extensions import Format, get_annotations

from ptacc.errors import CompositionError
from ptacc.validation import value_text

_CLASS_VARIABLE = re.compile(r"\s*(?:\w+\s*\.\s*)*ClassVar\s*(?:\[(?P<type>.*)\]\s*)?", re.DOTALL)
_INIT_VARIABLE = re.compile(r"\s*(?:\w+\s*\.\s*)*InitVar\b")
_METRIC_METHODS = ("update", "compute", "reset")


# ---- reading


def own_annotations(cls: type) -> dict[str, Any]:
    """Return the annotations of the class body itself, unevaluated where they are strings."""
    return dict(get_annotations(cls, format=Format.FORWARDREF))


def inherited_options(cls: type) -> dict[str, Field[Any]]:
    """Return the options of the bases by name, each as the class that stands nearest in the MRO declares it."""
    options: dict[str, Field[Any]] = {}
    for base in reversed(cls.__mro__[1:]):
        if "__dataclass_fields__" in base.__dict__:
            own = own_annotations(base)
            options |= {option.name: option for option in dataclasses.fields(base) if option.name in own}
    return options


def is_method(cls: type, name: str, value: object) -> bool:
    """Say whether a class body defines `value` as a method or property; a function that it assigns is a value."""
    function = unwrap_function(value)
    if function is None or isinstance(value, classmethod):
        return isinstance(value, property | functools.cached_property | classmethod)
    return function.__qualname__ == f"{cls.__qualname__}.{name}"


def unwrap_function(value: object) -> Callable[..., Any] | None:
    """Return the function that a member of a class is, or is a static or class method of; None for anything else."""
    value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    return value if inspect.isfunction(value) else None


# ---- preparing a class for `dataclass`


def prepare_annotations(cls: type) -> None:
    """Make `option = value` a new default of an inherited option, and class variables known to `dataclass`."""
    annotations = own_annotations(cls)
    changed = {name: _resolve_class_var(cls, annotation) for name, annotation in annotations.items()}
    inherited = inherited_options(cls)
    for name, value in cls.__dict__.items():
        if name not in inherited or name in annotations or is_method(cls, name, value):
            continue
        if not has_default(inherited[name]):
            text = value_text(value)
            raise CompositionError(
                f"{cls.__name__}.{name} = {text}: the option {name} has no default that this could change, and type "
                f"checkers go on asking for it. Annotate it: `{name}: {type_text(inherited[name].type)} = {text}`."
            )
        changed[name] = _get_declared_type(cls, inherited[name])
    if changed != annotations:
        cls.__annotations__ = changed


@contextlib.contextmanager
def use_nearest_defaults(cls: type) -> Iterator[None]:
    """Have a dataclass that is made in this block take each inherited option from the nearest class in the MRO.

    By itself it takes all options of a base at once, those that the base only inherited, too: beside a mixin that sets
    `callbacks`, any other mixin in front would bring back the default of the core.
    """
    taken: dict[str, Field[Any]] = {}
    for base in reversed(cls.__mro__[1:]):
        taken |= base.__dict__.get("__dataclass_fields__", {})
    own = own_annotations(cls)
    nearer = {n: option for n, option in inherited_options(cls).items() if n not in own and taken[n] is not option}
    if nearer:
        cls.__annotations__ = own | {name: option.type for name, option in nearer.items()}
    for name, option in nearer.items():
        setattr(cls, name, option)
    yield
    for name in nearer:
        del cls.__annotations__[name]
        if name in cls.__dict__:
            delattr(cls, name)


def has_default(option: Field[Any]) -> bool:
    """Say whether an option may be left out."""
    return option.default is not MISSING or option.default_factory is not MISSING


def _resolve_class_var(cls: type, annotation: Any) -> Any:
    """Return `ClassVar` itself where it is spelt in a string, which `dataclass` reads in a few spellings only."""
    spelt = _CLASS_VARIABLE.fullmatch(type_text(annotation)) if isinstance(annotation, str | ForwardRef) else None
    class_var: Any = ClassVar
    if spelt is None:
        return annotation
    return class_var[ForwardRef(spelt["type"], module=cls.__module__)] if spelt["type"] else class_var


def _get_declared_type(cls: type, option: Field[Any]) -> Any:
    """Return the type of an inherited option, to be resolved in the module that declares it."""
    if not isinstance(option.type, str):
        return option.type
    owner = next(base for base in cls.__mro__[1:] if option.name in own_annotations(base))
    declared = own_annotations(owner)[option.name]  # resolved already, where the class is public
    return ForwardRef(declared, module=owner.__module__, is_class=True) if isinstance(declared, str) else declared


# ---- guards


def check_own_options(cls: type) -> None:
    """Raise `CompositionError` for annotated names that are no options, or would take something else's place."""
    inherited = inherited_options(cls)
    for name, annotation in own_annotations(cls).items():
        if annotation is ClassVar or get_origin(annotation) is ClassVar:
            continue
        default = cls.__dict__.get(name, MISSING)
        _check_can_be_option(cls, name, annotation, default)
        if name == "model" and name in inherited:
            raise CompositionError(
                f"{cls.__name__}.model: redeclaring it turns it keyword-only, so that {cls.__name__}(model, ...) "
                "fails. Leave it out; where you need its own type, read it in a property of your own."
            )
        if name not in inherited and any(_is_callable_member(base.__dict__.get(name)) for base in cls.__mro__[1:]):
            raise CompositionError(
                f"{cls.__name__}.{name}: a base has a method or property of this name, and the option would take its "
                "place. Give the option another name."
            )
        _check_default(cls, name, default)


def check_members_against_options(cls: type) -> None:
    """Raise `CompositionError` for a method or property that is named like an inherited option."""
    options, annotated = inherited_options(cls), own_annotations(cls)
    for name, value in cls.__dict__.items():
        if name in options and name not in annotated and is_method(cls, name, value):
            kind = "property" if isinstance(value, property | functools.cached_property) else "method"
            raise CompositionError(
                f"{cls.__name__}.{name}: {name} is an option, and this {kind} would take its place. "
                f"Give the {kind} another name."
            )


def _check_can_be_option(cls: type, name: str, annotation: object, default: object) -> None:
    if isinstance(annotation, InitVar) or annotation is InitVar or _INIT_VARIABLE.match(type_text(annotation)):
        raise CompositionError(
            f"{cls.__name__}.{name}: InitVar makes a keyword that no `__init__` here can read. "
            f"Make it an option, `{name}: type = default`, and use it in `check_options` or a hook."
        )
    takes_part = default.init if isinstance(default, Field) else True
    if name.startswith("_") and takes_part:
        raise CompositionError(
            f"{cls.__name__}.{name}: an annotated name is an option, and this one would become the keyword "
            f"{name!r} of the constructor. Write `{name}: ClassVar[...]` if it belongs to the class, "
            f"`{name}: ... = field(init=False)` if to each trainer."
        )


def _check_default(cls: type, name: str, default: object) -> None:
    value = default.default if isinstance(default, Field) else default
    if value is MISSING or isinstance(value, type):
        return
    is_metric = all(callable(getattr(value, method, None)) for method in _METRIC_METHODS)
    if isinstance(value, nn.Module) or is_metric or type(value).__hash__ is None:
        made = f"{type(value).__name__}(...)"
        raise CompositionError(
            f"{cls.__name__}.{name} = {made}: every trainer would share this one object. "
            f"Write `{name}: ... = field(default_factory=lambda: {made})`."
        )


# ---- text


def type_text(annotation: object) -> str:
    """Write an annotation as it stands in source code."""
    if isinstance(annotation, str):
        return annotation
    forward = getattr(annotation, "__forward_arg__", None)
    if forward is not None:
        return str(forward)
    return annotation.__name__ if isinstance(annotation, type) and get_origin(annotation) is None else str(annotation)


def _is_callable_member(value: object) -> bool:
    return unwrap_function(value) is not None or isinstance(value, property | functools.cached_property | classmethod)
