"""Guards: what no type checker sees in a class statement is refused there, with the line to write instead.

The checks read `__mro__` and `__dict__` only. They never call `issubclass`: between abstract base classes it can answer
wrongly while a class is being made, and the wrong answer is cached.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, get_origin

from torch import nn
from typing_extensions import Format, get_annotations

from ptacc.core.roles import is_mixin, loop_of
from ptacc.core.typeargs import disagreeing_batches
from ptacc.errors import CompositionError

COOPERATIVE = frozenset({"event", "around", "fold", "any-of"})
MARKERS = frozenset({"_role", "_mixins_stand_before_the_loop", "_takes_the_batches_of_the_loop"})
"""Defined in several classes on purpose: type checkers compare them, see `TrainingLoop`."""
CALLED_ON_EVERY_CLASS = frozenset({"check_options"})
_SUPER_CALL = {
    "event": "super().{name}({arguments})",
    "around": "with super().{name}({arguments}): yield",
    "fold": "super().{name}({arguments})",
    "any-of": "return super().{name}({arguments}) or ...",
}


def own_annotations(cls: type) -> dict[str, Any]:
    """Return the annotations of the class body itself, unevaluated where they are strings."""
    return dict(get_annotations(cls, format=Format.FORWARDREF))


def copy_annotations(cls: type) -> None:
    """Make `option = value` in a class body a new default of an inherited option, by copying its annotation."""
    inherited = _inherited_options(cls)
    own = own_annotations(cls)
    for name, value in list(cls.__dict__.items()):
        if name not in inherited or name in own or _is_callable_member(value):
            continue
        if not _has_default(inherited[name]):
            raise CompositionError(
                f"{cls.__name__}.{name} = {value!r}: the option {name} has no default that this could change, and type "
                f"checkers go on asking for it. Annotate it: `{name}: {_type_text(inherited[name].type)} = {value!r}`."
            )
        cls.__annotations__ = {**own_annotations(cls), name: inherited[name].type}


def check_class_statement(cls: type) -> None:
    """Raise `CompositionError` for what one class body cannot say."""
    _check_no_constructor(cls)
    _check_own_options(cls)
    _check_members_against_options(cls)
    _check_hooks(cls)


def check_composition(cls: type) -> None:
    """Raise `CompositionError` for bases that cannot be combined."""
    _check_names_of_two_owners(cls)
    _check_order(cls)
    if complaint := disagreeing_batches(cls):
        raise CompositionError(complaint)


def check_known_hooks(cls: type, advice: str = "") -> None:
    """Refuse an `on_...` or `around_...` that no base declares: nothing would ever call it."""
    for name, value in cls.__dict__.items():
        if not name.startswith(("on_", "around_")) or not _is_callable_member(value):
            continue
        declared = {n for base in cls.__mro__[1:] for n in base.__dict__ if n.startswith(("on_", "around_"))}
        if name not in declared and shape_of(value) is None:
            raise CompositionError(
                f"{cls.__name__}.{name}: no base declares this hook, so nothing would call it. "
                f"{_closest(name, declared)}Give a method of your own another name.{advice}"
            )


def _check_no_constructor(cls: type) -> None:
    for name in ("__init__", "__post_init__"):
        if name in cls.__dict__:
            raise CompositionError(
                f"{cls.__name__}.{name}: options are annotated names in the class body, and the constructor is made "
                "from them. Write `name: type = default` for an option, `check_options(self)` for checks, and "
                "`on_run_start(self)` for what a run needs."
            )


def _check_own_options(cls: type) -> None:
    for name, annotation in own_annotations(cls).items():
        text = _type_text(annotation)
        default = cls.__dict__.get(name, dataclasses.MISSING)
        if "InitVar" in text:
            raise CompositionError(
                f"{cls.__name__}.{name}: InitVar makes a keyword that no `__init__` here can read. "
                f"Make it an option, `{name}: type = default`, and use it in `check_options` or a hook."
            )
        if _is_class_variable(annotation, text):
            continue
        takes_part = default.init if isinstance(default, dataclasses.Field) else True
        if name.startswith("_") and takes_part:
            raise CompositionError(
                f"{cls.__name__}.{name}: an annotated name is an option, and this one would become the keyword "
                f"{name!r} of the constructor. Write `{name}: ClassVar[...]` if it belongs to the class, "
                f"`{name}: ... = field(init=False)` if to each trainer."
            )
        if name == "model" and "model" in _inherited_options(cls):
            raise CompositionError(
                f"{cls.__name__}.model: redeclaring it turns it keyword-only, so that {cls.__name__}(model, ...) "
                "fails. Leave it out; where you need its own type, read it in a property of your own."
            )
        if any(_is_callable_member(base.__dict__.get(name)) for base in cls.__mro__[1:]):
            raise CompositionError(
                f"{cls.__name__}.{name}: a base has a method or property of this name, and the option would take its "
                "place. Give the option another name."
            )
        _check_default(cls, name, default)


def _check_default(cls: type, name: str, default: object) -> None:
    value = default.default if isinstance(default, dataclasses.Field) else default
    if isinstance(value, nn.Module) or (value is not dataclasses.MISSING and value.__class__.__hash__ is None):
        raise CompositionError(
            f"{cls.__name__}.{name} = {type(value).__name__}(...): every trainer would share this one object. "
            f"Write `{name}: ... = field(default_factory=lambda: {type(value).__name__}(...))`."
        )


def _check_members_against_options(cls: type) -> None:
    options, annotated = _inherited_options(cls), own_annotations(cls)
    for name, value in cls.__dict__.items():
        if name in options and name not in annotated and _is_callable_member(value):
            raise CompositionError(
                f"{cls.__name__}.{name}: {name} is an option, and this {_kind(value)} would take its place. "
                f"Give the {_kind(value)} another name."
            )


def _check_hooks(cls: type) -> None:
    check_known_hooks(cls, " To declare a new hook, decorate it with `@hook(...)`.")
    for name, value in cls.__dict__.items():
        function = _function_of(value)
        shape = next((s for base in cls.__mro__[1:] if (s := shape_of(base.__dict__.get(name)))), None)
        if function is None or shape not in COOPERATIVE or getattr(function, "__ptacc_replaces__", False):
            continue
        if not calls_super(function):
            code = inspect.unwrap(function).__code__
            arguments = ", ".join(code.co_varnames[1 : code.co_argcount])
            call = _SUPER_CALL[shape].format(name=name, arguments=arguments)
            raise CompositionError(
                f"{cls.__name__}.{name}: never calls super(), so the mixins behind it would not hear of it. "
                f"Add `{call}`, or mark it `@replaces` if it is meant to stand for them all."
            )


def _check_names_of_two_owners(cls: type) -> None:
    owners: dict[str, list[type]] = {}
    for base in cls.__mro__:
        if base.__module__ in {"builtins", "abc", "typing", "typing_extensions"}:
            continue
        for name in {**base.__dict__, **own_annotations(base)}:
            if not (name.startswith("__") or name in MARKERS or name in CALLED_ON_EVERY_CLASS or name == "_abc_impl"):
                owners.setdefault(name, []).append(base)
    for name, classes in owners.items():
        for first, second in itertools.combinations(classes, 2):
            if not any(c in first.__mro__ and c in second.__mro__ for c in classes):
                raise CompositionError(
                    f"{cls.__name__}: {name} is declared by {first.__name__} and by {second.__name__}, who do not "
                    f"know of each other, and {first.__name__}'s would silently win. Rename one of them."
                )


def _check_order(cls: type) -> None:
    loop = loop_of(cls)
    if loop is None:
        return
    ready = next(base for base in (*cls.__bases__, cls) if loop in base.__mro__)
    for late in filter(is_mixin, cls.__mro__[cls.__mro__.index(loop) :]):
        raise CompositionError(
            f"{cls.__name__}: {late.__name__} comes after {ready.__name__}, so its hooks would never run. "
            f"Put it before: `class {cls.__name__}({late.__name__}, {ready.__name__})`."
        )


def _inherited_options(cls: type) -> dict[str, dataclasses.Field[Any]]:
    options: dict[str, dataclasses.Field[Any]] = {}
    for base in reversed(cls.__mro__[1:]):
        options |= base.__dict__.get("__dataclass_fields__", {})
    return options


def _has_default(option: dataclasses.Field[Any]) -> bool:
    return option.default is not dataclasses.MISSING or option.default_factory is not dataclasses.MISSING


def _is_callable_member(value: object) -> bool:
    members = (property, functools.cached_property, classmethod, staticmethod)
    return isinstance(value, members) or inspect.isfunction(value)


def _kind(value: object) -> str:
    return "property" if isinstance(value, property | functools.cached_property) else "method"


def _function_of(value: object) -> Callable[..., Any] | None:
    value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    return value if inspect.isfunction(value) else None


def calls_super(value: object) -> bool:
    """Say whether a function calls `super()`, seen through its decorators; True for what is no function."""
    function = _function_of(value)
    return function is None or "__class__" in inspect.unwrap(function).__code__.co_freevars


def shape_of(value: object) -> str | None:
    """Return the shape of the hook that a member of a class declares, None where it declares none."""
    return getattr(_function_of(value), "__ptacc_shape__", None)


def _is_class_variable(annotation: object, text: str) -> bool:
    return (
        annotation is ClassVar
        or get_origin(annotation) is ClassVar
        or text.split("[", maxsplit=1)[0].endswith("ClassVar")
    )


def _type_text(annotation: object) -> str:
    if isinstance(annotation, str):
        return annotation
    forward = getattr(annotation, "__forward_arg__", None)
    if forward is not None:
        return str(forward)
    return annotation.__name__ if isinstance(annotation, type) and get_origin(annotation) is None else str(annotation)


def _closest(name: str, known: set[str]) -> str:
    import difflib  # for an error message alone

    found: Iterator[str] = iter(difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6))
    match = next(found, None)
    return f"Did you mean `{match}`? " if match else ""
