"""Composition: options are dataclass fields, mixins are combined by a class statement, and guards read that statement.

`Composable` is an empty root on purpose: type checkers treat the class that carries `dataclass_transform` as a marker
and do not see fields of its own (PEP 681).
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC
from collections.abc import Callable, Collection
from typing import Any, Literal, TypeAlias

from typing_extensions import TypeVar, dataclass_transform, override

from ptacc.composition.fields import own_annotations, prepare_annotations, use_nearest_defaults
from ptacc.composition.guards import check_class_statement, check_composition
from ptacc.composition.roles import is_mixin
from ptacc.errors import CompositionError
from ptacc.validation import check_keywords, value_text

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
Shape: TypeAlias = Literal["default", "factory", "fold", "around", "event", "any-of"]


def hook(shape: Shape) -> Callable[[FunctionT], FunctionT]:
    """Declare a hook and how its overrides combine.

    Args:
        shape: `"event"`, `"around"`, `"fold"` and `"any-of"` are cooperative: every override calls `super()`, which a
            guard checks at the class statement. `"default"` and `"factory"` may be replaced whole.

    Example:
        >>> class Mine(Composable):
        ...     @hook("event")
        ...     def on_tea_break(self) -> None: ...
    """

    def declare(function: FunctionT) -> FunctionT:
        function.__dict__["__ptacc_shape__"] = shape
        return function

    return declare


def replaces_super(function: FunctionT) -> FunctionT:
    """Mark an override of a cooperative hook that leaves out `super()` on purpose, for it and all behind it."""
    function.__dict__["__ptacc_replaces__"] = True
    return function


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(dataclasses.field,))
class Composable(ABC):
    """The root of everything that is composed from mixins.

    A subclass becomes a dataclass by its statement alone: each annotated name is an option, and so a keyword of the
    one constructor. What no type checker sees in that statement, guards refuse with `CompositionError`.
    """

    @override
    def __init_subclass__(cls, **keywords: object) -> None:
        super().__init_subclass__(**keywords)
        prepare_annotations(cls)
        check_class_statement(cls)
        with use_nearest_defaults(cls):
            dataclasses.dataclass(kw_only=True, eq=False, repr=False)(cls)
        type.__setattr__(cls, "__init__", _record_given_options(cls.__init__))  # the dataclass made it just now
        check_composition(cls, Composable)

    def __post_init__(self) -> None:
        """Run every class's own `check_options`, the base classes' first."""
        if type(self).__hash__ is None:
            raise CompositionError(
                f"{type(self).__name__} is compared by value, and so has no hash: trainers are told apart by identity. "
                "Leave out @dataclass, since annotated names are options without it, or your own __eq__."
            )
        for base in reversed(type(self).__mro__):
            if "check_options" in base.__dict__:
                base.__dict__["check_options"](self)

    def check_options(self) -> None:
        """Raise `OptionError` for values that cannot be right.

        Each class checks its own options and nothing else; all of these run, with no `super()`.
        """

    def given_options(self) -> frozenset[str]:
        """Return the names of the options that the constructor was given."""
        given: frozenset[str] = vars(self)["_given_options"]
        return given

    @override
    def __repr__(self) -> str:
        """Show the options that were given, each in a few characters, but those that are no one's business."""
        hidden = {option.name for option in _fields(self) if not option.repr}
        given = vars(self).get("_given_options", frozenset()) - hidden
        shown = (f"{name}={value_text(value)}" for name, value in vars(self).items() if name in given)
        return f"{type(self).__name__}({', '.join(shown)})"

    @override
    def __getstate__(self) -> dict[str, object]:
        """Leave out of copies and pickles what belongs to one object alone, such as its run."""
        private = {option.name for option in _non_option_fields(self)}
        return {name: value for name, value in vars(self).items() if name not in private}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take over the options, and make anew what belongs to one object alone."""
        vars(self).update(state)
        for option in _non_option_fields(self):
            if option.default_factory is not dataclasses.MISSING:
                vars(self)[option.name] = option.default_factory()


def _non_option_fields(composed: Composable) -> list[dataclasses.Field[Any]]:
    """Return the fields that are no options: `_name: ... = field(init=False)`."""
    return [field for field in _fields(composed) if field.name.startswith("_") and not field.init]


def _fields(composed: Composable) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(composed)  # type: ignore[arg-type]  # it is decorated when its class statement is run


def _record_given_options(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap a constructor so that the names of the options it was given are kept, for `explain()`."""

    @functools.wraps(init)
    def remember(self: Composable, *args: object, **options: object) -> None:
        fields = [field for field in dataclasses.fields(self) if field.init]  # type: ignore[arg-type]
        known = {field.name for field in fields}
        check_keywords(type(self).__name__, options, known, _suggest_mixin(options.keys() - known))
        positional = [field.name for field in fields if not field.kw_only]
        vars(self)["_given_options"] = frozenset(positional[: len(args)]) | frozenset(options)
        init(self, *args, **options)

    return remember


def _suggest_mixin(names: Collection[str]) -> str:
    """Say which mixin has the first of some unknown options, empty where none has."""
    waiting = Composable.__subclasses__() if names else []
    for cls in waiting:
        waiting += cls.__subclasses__()
        for name in names:
            if name in own_annotations(cls) and is_mixin(cls):
                return f"{name} is an option of {cls.__name__}: compose it."
    return ""
