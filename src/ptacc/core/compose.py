"""Composition: options are dataclass fields, mixins are combined by a class statement, and guards read that statement.

`Composable` is an empty root on purpose: type checkers treat the class that carries `dataclass_transform` as a marker
and do not see fields of its own (PEP 681).
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from typing_extensions import TypeVar, dataclass_transform, override

from ptacc.core.guards import check_class_statement, check_composition, copy_annotations

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


def replaces(function: FunctionT) -> FunctionT:
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
        copy_annotations(cls)
        check_class_statement(cls)
        dataclasses.dataclass(kw_only=True, eq=False, repr=False)(cls)
        cls.__init__ = _remembering(cls.__init__)  # type: ignore[method-assign]  # the dataclass made it just now
        check_composition(cls)

    def __post_init__(self) -> None:
        """Run every class's own `check_options`, the base classes' first."""
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


def _remembering(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap a constructor so that the names of the options it was given are kept, for `explain()`."""

    @functools.wraps(init)
    def remember(self: Composable, *args: object, **options: object) -> None:
        positional = [option.name for option in dataclasses.fields(self) if not option.kw_only]  # type: ignore[arg-type]
        vars(self)["_given_options"] = frozenset(positional[: len(args)]) | frozenset(options)
        init(self, *args, **options)

    return remember
