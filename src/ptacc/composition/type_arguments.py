"""Type arguments of a class definition: the model of its loop, and whether its mixins accept the loop's batches."""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

from torch import nn
from typing_extensions import TypeVar, get_original_bases, is_typeddict

from ptacc.composition.fields import type_text
from ptacc.composition.roles import get_role

_PROMOTED_TO: dict[type, tuple[type, ...]] = {int: (float, complex), float: (complex,)}
"""Type checkers accept an `int` as a `float` or `complex`, and a `float` as a `complex`."""


def describe_type_mismatch(cls: type) -> str:
    """Describe a model that is not a module, or a mixin that does not accept the loop's batches or outputs; else empty.

    A mixin may accept wider types than the loop has (`object` accepts anything). Type variables, protocols and other
    types that cannot be compared at run time are left to the type checker.
    """
    bases = list(_bases_with_arguments(cls, ()))
    loops = [arguments for base, arguments, _ in bases if get_role(base) == "loop"]
    mixins = [(named_by, arguments) for base, arguments, named_by in bases if get_role(base) == "batch mixin"]
    for batch, output, model, _ in loops:
        if not may_accept(nn.Module, model):
            return (
                f"{cls.__name__}: the type argument for the model is {type_text(model)}, and must be a subclass of "
                "nn.Module. It is the third of TrainingLoop; the type of samples is the fourth: "
                f"`TrainingLoop[{type_text(batch)}, {type_text(output)}, nn.Module, {type_text(model)}]`."
            )
    for given, (mixin, accepted) in itertools.product(loops, mixins):
        for what, narrow, wide in zip(("batches", "outputs"), given, accepted, strict=False):
            if not may_accept(wide, narrow):
                return (
                    f"{cls.__name__}: the loop's {what} are {type_text(narrow)}, and {mixin.__name__} accepts "
                    f"{type_text(wide)}. {_suggest_fix(mixin, given)}"
                )
    return ""


def find_model_mismatch(cls: type, model: object) -> Any:
    """Return the type that the definition of a trainer states for its model, if `model` is not of it; else None."""
    for base, arguments, _ in _bases_with_arguments(cls, ()):
        if get_role(base) == "loop" and not _may_be_instance(model, arguments[2]):
            return arguments[2]
    return None


def _may_be_instance(value: object, annotation: Any) -> bool:
    """Return whether a value is of a type; True if that is undecidable. A type variable stands for its bound."""
    annotation = _strip_alias(getattr(annotation, "__bound__", annotation))
    if _is_union(annotation):
        return any(_may_be_instance(value, part) for part in get_args(annotation))
    cls = get_origin(annotation) or annotation
    if cls is Any or not isinstance(cls, type) or getattr(cls, "_is_protocol", False):
        return True
    return isinstance(value, cls)


def may_accept(wide: Any, narrow: Any) -> bool:
    """Return whether a value of type `narrow` can be passed where `wide` is expected; True if that is undecidable.

    Example:
        >>> may_accept(object, int), may_accept(tuple[int, ...], tuple[int, int]), may_accept(list[int], tuple[int])
        (True, True, False)
    """
    wide, narrow = _strip_alias(wide), _strip_alias(narrow)
    if wide is Any or narrow is Any or wide is object or wide == narrow:
        return True
    if _is_union(narrow):
        return all(may_accept(wide, part) for part in get_args(narrow))
    if _is_union(wide):
        return any(may_accept(part, narrow) for part in get_args(wide))
    wide_class, narrow_class = get_origin(wide) or wide, get_origin(narrow) or narrow
    if not (isinstance(wide_class, type) and isinstance(narrow_class, type)):
        return True
    if getattr(wide_class, "_is_protocol", False) or (is_typeddict(wide) and is_typeddict(narrow)):
        return True
    if wide_class not in (*narrow_class.__mro__, *_PROMOTED_TO.get(narrow_class, ())):
        return bool(getattr(wide_class, "__abstractmethods__", None))  # it may accept a class without inheritance
    return _arguments_may_match(wide, narrow) if wide_class is narrow_class else True


def _strip_alias(annotation: Any) -> Any:
    """Resolve type aliases and remove `Annotated`."""
    while hasattr(annotation, "__value__") or get_origin(annotation) is Annotated:
        annotation = annotation.__value__ if hasattr(annotation, "__value__") else annotation.__origin__
    return annotation


def _arguments_may_match(wide: Any, narrow: Any) -> bool:
    wide_arguments, narrow_arguments = get_args(wide), get_args(narrow)
    if not wide_arguments or not narrow_arguments:
        return True
    if (get_origin(wide) or wide) is tuple and wide_arguments[-1] is Ellipsis:
        return all(may_accept(wide_arguments[0], part) for part in narrow_arguments if part is not Ellipsis)
    if len(wide_arguments) != len(narrow_arguments):
        return Ellipsis in narrow_arguments
    return all(may_accept(w, n) for w, n in zip(wide_arguments, narrow_arguments, strict=True))


def _bases_with_arguments(cls: type, arguments: tuple[Any, ...]) -> Iterator[tuple[type, tuple[Any, ...], type]]:
    """Yield each base of `cls`, its type arguments, and the class that lists it as a base; once for each path to it."""
    parameters: tuple[Any, ...] = getattr(cls, "__parameters__", ())
    bound = dict(zip(parameters, arguments, strict=False))
    for base in get_original_bases(cls):
        origin = get_origin(base) or base
        if not isinstance(origin, type) or origin is object:
            continue
        given = get_args(base) or tuple(_get_default(p) for p in getattr(origin, "__parameters__", ()))
        passed = tuple(_substitute(argument, bound) for argument in given)
        yield origin, passed, cls
        yield from _bases_with_arguments(origin, passed)


def _substitute(annotation: Any, bound: dict[Any, Any]) -> Any:
    if isinstance(annotation, TypeVar):
        return bound.get(annotation, annotation)
    parameters = getattr(annotation, "__parameters__", ())
    if not parameters or get_origin(annotation) is None:
        return annotation
    return annotation[tuple(bound.get(p, p) for p in parameters)]


def fill_type_defaults(cls: Any, arguments: Any) -> tuple[Any, ...]:
    """Append the defaults of omitted type parameters, resolved; `typing` leaves type variables in them as they are."""
    given = arguments if isinstance(arguments, tuple) else (arguments,)
    parameters: tuple[Any, ...] = cls.__parameters__
    bound = dict(zip(parameters, given, strict=False))
    for parameter in parameters[len(given) :]:
        default = _get_default(parameter)
        bound[parameter] = bound.get(default, default) if isinstance(default, TypeVar) else default
    return (*given, *(bound[parameter] for parameter in parameters[len(given) :]))


def _get_default(parameter: Any) -> Any:
    return parameter.__default__ if getattr(parameter, "has_default", lambda: False)() else parameter


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _suggest_fix(mixin: type, given: tuple[Any, ...]) -> str:
    if getattr(mixin, "__parameters__", ()):
        loop_types = ", ".join(map(type_text, given[:2]))  # then come the types of the model and of samples
        return f"Give it the loop's types, `{mixin.__name__}[{loop_types}]`, if its hooks can handle them."
    return (
        f"Compose it with a loop over the batches that it accepts, or make it generic, `class {mixin.__name__}("
        "BatchMixin[BatchT, OutputT])`, if its hooks can handle any."
    )
