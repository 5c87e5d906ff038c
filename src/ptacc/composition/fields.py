"""Options: the annotated names of class bodies, how they are inherited, and checks of how they are declared."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Generator
from dataclasses import MISSING, Field, InitVar
from typing import Any, ClassVar, ForwardRef, get_origin

from torch import nn
from typing_extensions import Format, evaluate_forward_ref, get_annotations

from ptacc.composition.misnamed import find_near_miss
from ptacc.errors import CompositionError
from ptacc.types.protocols import MetricLike
from ptacc.validation import value_text

_CLASS_VARIABLE = re.compile(r"\s*(?:\w+\s*\.\s*)*ClassVar\s*(?:\[(?P<type>.*)\]\s*)?", re.DOTALL)
_INIT_VARIABLE = re.compile(r"\s*(?:\w+\s*\.\s*)*InitVar\b")


def own_annotations(cls: type) -> dict[str, Any]:
    """Return the annotations of the class body itself; those that are strings are not evaluated."""
    return dict(get_annotations(cls, format=Format.FORWARDREF))


def inherited_options(cls: type) -> dict[str, Field[Any]]:
    """Return the options of the bases by name, each as declared by the nearest class in the MRO."""
    options: dict[str, Field[Any]] = {}
    for base in reversed(cls.__mro__[1:]):
        if "__dataclass_fields__" in base.__dict__:
            own = own_annotations(base)
            options |= {option.name: option for option in dataclasses.fields(base) if option.name in own}
    return options


def is_method(cls: type, name: str, value: object) -> bool:
    """Return whether a class body defines `value` as a method or property.

    A function that the class body assigns is not a method: it may be the default of an option.
    """
    function = unwrap_function(value)
    if function is None or isinstance(value, classmethod):
        return isinstance(value, property | functools.cached_property | classmethod)
    return function.__qualname__ == f"{cls.__qualname__}.{name}"


def unwrap_function(value: object) -> Callable[..., Any] | None:
    """Return the function of a method, static method or class method; None for any other member of a class."""
    value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    return value if inspect.isfunction(value) else None


# ---- preparing a class for `dataclass`


def prepare_annotations(cls: type) -> None:
    """Prepare the annotations of a class for `dataclass`.

    `option = value` without an annotation becomes a new default of an inherited option. Every spelling of `ClassVar`
    becomes one that `dataclass` recognises.
    """
    annotations = own_annotations(cls)
    prepared = {name: _resolve_class_var(cls, annotation) for name, annotation in annotations.items()}
    inherited = inherited_options(cls)
    for name, value in cls.__dict__.items():
        if name not in inherited or name in annotations or is_method(cls, name, value):
            continue
        if not has_default(inherited[name]):
            text = value_text(value)
            raise CompositionError(
                f"{cls.__name__}.{name} = {text}: the option {name} has no default, and without an annotation type "
                f"checkers still require it. Annotate it: `{name}: {type_text(inherited[name].type)} = {text}`."
            )
        prepared[name] = _get_declared_type(cls, inherited[name])
    if prepared != annotations:
        cls.__annotations__ = prepared


@contextlib.contextmanager
def use_nearest_defaults(cls: type) -> Generator[None]:
    """Make `dataclass`, applied within the block, inherit each option from the nearest class that declares it.

    By itself, `dataclass` copies all fields of a base at once, including those that the base only inherited. With
    `class T(AMPMixin, Quiet, Trainer)`, where `Quiet` sets a new default of `callbacks`, the default that `AMPMixin`
    inherited from the core would win.
    """
    by_dataclass: dict[str, Field[Any]] = {}
    for base in reversed(cls.__mro__[1:]):
        by_dataclass |= base.__dict__.get("__dataclass_fields__", {})
    own, nearest = own_annotations(cls), inherited_options(cls)
    changed = {name: option for name, option in nearest.items() if name not in own and by_dataclass[name] is not option}
    if changed:
        cls.__annotations__ = own | {name: option.type for name, option in changed.items()}
    for name, option in changed.items():
        setattr(cls, name, option)
    yield
    for name in changed:
        del cls.__annotations__[name]
        if name in cls.__dict__:
            delattr(cls, name)


def has_default(option: Field[Any]) -> bool:
    """Return whether an option may be left out."""
    return option.default is not MISSING or option.default_factory is not MISSING


def _resolve_class_var(cls: type, annotation: Any) -> Any:
    """Return `ClassVar` for a string that names it; `dataclass` recognises only some spellings in strings."""
    match = _CLASS_VARIABLE.fullmatch(type_text(annotation)) if isinstance(annotation, str | ForwardRef) else None
    class_var: Any = ClassVar
    if match is None:
        return annotation
    return class_var[ForwardRef(match["type"], module=cls.__module__)] if match["type"] else class_var


def _get_declared_type(cls: type, option: Field[Any]) -> Any:
    """Return the type of an inherited option; a string is resolved in the module of the class that declares it."""
    if not isinstance(option.type, str):
        return option.type
    owner = next(base for base in cls.__mro__[1:] if option.name in own_annotations(base))
    declared = own_annotations(owner)[option.name]  # already evaluated if the class is public
    return ForwardRef(declared, module=owner.__module__, is_class=True) if isinstance(declared, str) else declared


# ---- what type checkers and other readers know of the constructor


def property_option(*, alias: str, kw_only: bool) -> Any:
    """Declare, for type checkers only, an option that is read through a property.

    A subclass may narrow the type of a property, but not of a field, which can be assigned. `alias` names the option.
    """
    raise NotImplementedError


def evaluate_constructor(cls: type, init: Callable[..., None]) -> None:
    """Evaluate the annotations of the constructor that `dataclass` generated, each in the module that contains it.

    `typing.get_type_hints` and `inspect.signature` would evaluate all of them in one module. An annotation with a name
    that is not defined yet becomes a `ForwardRef`, which knows its module.
    """
    declared: dict[str, tuple[Any, str]] = {}
    for base in reversed(cls.__mro__):
        declared |= {name: (annotation, base.__module__) for name, annotation in own_annotations(base).items()}
    for name in init.__annotations__.keys() & declared.keys():
        init.__annotations__[name] = _evaluate(*declared[name])


def _evaluate(annotation: Any, module: str) -> Any:
    if isinstance(annotation, str):
        annotation = ForwardRef(annotation, module=module, is_class=True)
    if not isinstance(annotation, ForwardRef):
        return annotation
    try:
        return evaluate_forward_ref(annotation)
    except Exception:  # noqa: BLE001  # an annotation is code of the user's, which may raise anything
        return annotation


# ---- checks


def check_own_options(cls: type) -> None:
    """Raise `CompositionError` for annotated names that cannot be options, or that hide another member."""
    inherited = inherited_options(cls)
    for name, annotation in own_annotations(cls).items():
        if annotation is ClassVar or get_origin(annotation) is ClassVar:
            continue
        default = cls.__dict__.get(name, MISSING)
        _check_can_be_option(cls, name, annotation, default)
        if name == "model" and name in inherited:
            raise CompositionError(
                f"{cls.__name__}.model: redeclaring it makes it keyword-only, so that {cls.__name__}(model, ...) "
                "fails. Leave it out. To declare its class, give it as a type argument: `Trainer[MyModel]`."
            )
        members = [base.__dict__.get(name) for base in cls.__mro__[1:]]
        if name not in inherited and any(
            unwrap_function(member) or isinstance(member, property | functools.cached_property | classmethod)
            for member in members
        ):
            raise CompositionError(
                f"{cls.__name__}.{name}: a base has a method or property of this name, and the option would hide it. "
                "Give the option another name."
            )
        _check_default(cls, name, default)


def check_members_against_options(cls: type) -> None:
    """Raise `CompositionError` for a method or property with the name of an inherited option."""
    options, annotated = inherited_options(cls), own_annotations(cls)
    for name, value in cls.__dict__.items():
        if name in options and name not in annotated and is_method(cls, name, value):
            kind = "property" if isinstance(value, property | functools.cached_property) else "method"
            raise CompositionError(
                f"{cls.__name__}.{name}: {name} is an option, and this {kind} would hide it. "
                f"Give the {kind} another name."
            )


def check_near_misses_of_options(cls: type) -> None:
    """Raise `CompositionError` for a value in a class body whose name is almost that of an inherited option.

    With an annotation it is a new option, whose name may continue the other, as `optimizers` or `model_b` does.
    """
    inherited, annotated = inherited_options(cls), own_annotations(cls)
    for name in {**cls.__dict__, **annotated}:
        value = cls.__dict__.get(name)
        if (
            any(hasattr(base, name) for base in cls.__mro__[1:])
            or isinstance(value, type)
            or is_method(cls, name, value)
        ):
            continue
        near = find_near_miss(name, inherited)
        if near is not None and not (name in annotated and name.startswith(near)):
            raise CompositionError(
                f"{cls.__name__}.{name}: no base has an option of this name. Did you mean `{near}`? Otherwise give it "
                "a name that differs more."
            )


def _check_can_be_option(cls: type, name: str, annotation: object, default: object) -> None:
    if isinstance(annotation, InitVar) or annotation is InitVar or _INIT_VARIABLE.match(type_text(annotation)):
        raise CompositionError(
            f"{cls.__name__}.{name}: only a `__post_init__` can read an InitVar, and trainers have none of their own. "
            f"Make it an option, `{name}: type = default`, and use it in `check_options` or a hook."
        )
    is_keyword = default.init if isinstance(default, Field) else True
    if name.startswith("_") and is_keyword:
        raise CompositionError(
            f"{cls.__name__}.{name}: an annotated name is an option, and this one would become the keyword "
            f"{name!r} of the constructor. Write `{name}: ClassVar[...]` if it belongs to the class, or "
            f"`{name}: ... = field(init=False)` if it belongs to each trainer."
        )


def _check_default(cls: type, name: str, default: object) -> None:
    value = default.default if isinstance(default, Field) else default
    if value is MISSING or isinstance(value, type):
        return
    if isinstance(value, nn.Module | MetricLike) or type(value).__hash__ is None:
        new_value = f"{type(value).__name__}(...)"
        raise CompositionError(
            f"{cls.__name__}.{name} = {new_value}: every trainer would share this object. "
            f"Write `{name}: ... = field(default_factory=lambda: {new_value})`."
        )


def type_text(annotation: object) -> str:
    """Return an annotation as it is written in source code."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation.__name__
    if isinstance(annotation, str | ForwardRef):
        return annotation if isinstance(annotation, str) else annotation.__forward_arg__
    return str(annotation).replace("torch.Tensor", "Tensor").replace("typing.", "")
