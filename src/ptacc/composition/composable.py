"""`Composable`, the root class of trainers and mixins: it makes each subclass a dataclass and checks it.

`Composable` declares no fields: type checkers ignore the fields of the class that carries `dataclass_transform`
(PEP 681).
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import Field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from typing_extensions import TypeVar, dataclass_transform, override

from ptacc.composition.fields import (
    evaluate_constructor,
    has_default,
    own_annotations,
    prepare_annotations,
    property_option,
    use_nearest_defaults,
)
from ptacc.composition.guards import check_class_statement, check_composition
from ptacc.composition.misnamed import suggest_attribute, suggest_option
from ptacc.composition.roles import is_mixin
from ptacc.errors import CompositionError
from ptacc.validation import check_keywords, did_you_mean, value_text

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
Shape: TypeAlias = Literal["default", "factory", "fold", "around", "event", "any-of"]


def hook(shape: Shape) -> Callable[[FunctionT], FunctionT]:
    """Declare a hook, and how its overrides combine.

    Args:
        shape: Overrides of `"event"`, `"around"`, `"fold"` and `"any-of"` hooks must call `super()`; this is checked
            when their class is defined. Overrides of `"default"` and `"factory"` hooks may leave it out.

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
    """Mark an override that does not call `super()` on purpose: it replaces the overrides of the classes behind it."""
    function.__dict__["__ptacc_replaces__"] = True
    return function


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(dataclasses.field, property_option))
class Composable(ABC):
    """The root class of trainers and mixins.

    Each subclass becomes a dataclass: every annotated name of its body is an option, which is a keyword of the
    constructor. `CompositionError` is raised for mistakes in a class definition that type checkers cannot find.
    """

    @override
    def __init_subclass__(cls, **keywords: object) -> None:
        super().__init_subclass__(**keywords)
        prepare_annotations(cls)
        check_class_statement(cls)
        with use_nearest_defaults(cls):
            dataclasses.dataclass(kw_only=True, eq=False, repr=False)(cls)
        evaluate_constructor(cls, cls.__init__)
        type.__setattr__(cls, "__init__", _record_given_options(cls.__init__))  # `dataclass` has just generated it
        check_composition(cls, Composable)

    def __post_init__(self) -> None:
        """Call `check_options` of every class, base classes first."""
        if type(self).__hash__ is None:
            raise CompositionError(
                f"{type(self).__name__} defines equality without a hash, and trainers are compared by identity. Leave "
                "out @dataclass (annotated names are options without it), or your own __eq__."
            )
        for base in reversed(type(self).__mro__):
            if "check_options" in base.__dict__:
                base.__dict__["check_options"](self)

    def check_options(self) -> None:
        """Raise `OptionError` if an option of this class has an invalid value.

        The constructor calls this method of every class in the MRO. Check the options that your class declares, and
        do not call `super()`.
        """

    if not TYPE_CHECKING:  # type checkers report unknown attributes by themselves

        def __getattr__(self, name: str) -> object:
            """Raise `AttributeError` with the name that was probably meant."""
            if hasattr(type(self), name):  # a property raised it: raise that error
                return object.__getattribute__(self, name)
            raise AttributeError(describe_unknown_attribute(type(self), name))

    def given_options(self) -> frozenset[str]:
        """Return the names of the options that were passed to the constructor."""
        given: frozenset[str] = vars(self)["_given_options"]
        return given

    @override
    def __repr__(self) -> str:
        hidden = {option.name for option in _fields(self) if not option.repr}
        given = vars(self).get("_given_options", frozenset()) - hidden
        shown = (f"{name}={value_text(value)}" for name, value in vars(self).items() if name in given)
        return f"{type(self).__name__}({', '.join(shown)})"

    @override
    def __getstate__(self) -> dict[str, object]:
        """Leave fields that are not options, such as the run, out of copies and pickles."""
        private = {option.name for option in _non_option_fields(self)}
        return {name: value for name, value in vars(self).items() if name not in private}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Set the options, and create new values of the fields that are not options."""
        vars(self).update(state)
        for option in _non_option_fields(self):
            if option.default_factory is not dataclasses.MISSING:
                vars(self)[option.name] = option.default_factory()


def _non_option_fields(composed: Composable) -> list[dataclasses.Field[Any]]:
    """Return the private fields, declared as `_name: ... = field(init=False)`."""
    return [field for field in _fields(composed) if field.name.startswith("_") and not field.init]


def _fields(composed: Composable) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(composed)  # type: ignore[arg-type]  # `__init_subclass__` makes it a dataclass


def _record_given_options(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap a constructor: it raises `TypeError` for unknown keywords, and records which options were passed."""

    @functools.wraps(init)
    def recording_init(self: Composable, *args: object, **options: object) -> None:
        fields = [field for field in _fields(self) if field.init]
        known = {field.name for field in fields}
        unknown = [name for name in options if name not in known]
        check_keywords(type(self).__name__, options, known, suggest_option(unknown) or _suggest_mixin(unknown))
        positional = [field.name for field in fields if not field.kw_only]
        if len(args) > len(positional):
            raise TypeError(describe_positional(type(self).__name__, positional, len(args), fields))
        vars(self)["_given_options"] = frozenset(positional[: len(args)]) | frozenset(options)
        init(self, *args, **options)

    return recording_init


def _suggest_mixin(unknown: Collection[str]) -> str:
    """Return a text that names a mixin with one of the unknown options; empty without such a mixin."""
    found = ((name, cls) for cls in (_mixins() if unknown else ()) for name in unknown if name in own_annotations(cls))
    return next((f"{name} is an option of {cls.__name__}: compose it." for name, cls in found), "")


def _mixins() -> Iterator[type]:
    """Yield all mixins, base classes first."""
    remaining: list[type] = Composable.__subclasses__()
    for cls in remaining:
        remaining += cls.__subclasses__()
        if is_mixin(cls):
            yield cls


@functools.lru_cache(maxsize=128)  # `hasattr` calls it for each name that is missing
def describe_unknown_attribute(cls: type, name: str) -> str:
    """Return the message for an attribute that a trainer does not have."""
    text = f"{cls.__name__} has no attribute {name!r}."
    if name.startswith("_"):
        return text
    owner = next((mixin for mixin in _mixins() if name in mixin.__dict__ or name in own_annotations(mixin)), None)
    if owner is not None:
        return f"{text} {owner.__name__} defines it: `class MyTrainer({owner.__name__}, {cls.__name__}): ...`."
    known = {known for known in dir(cls) if not known.startswith("_")} | {*getattr(cls, "__dataclass_fields__", ())}
    return f"{text} {suggest_attribute(name) or did_you_mean(name, known)}".rstrip()


def describe_positional(owner: str, positional: Sequence[str], given: int, fields: Sequence[Field[Any]]) -> str:
    """Return the message for a constructor that got too many positional arguments."""
    required = [field.name for field in fields if field.kw_only and not has_default(field)]
    call = ", ".join([*positional, *(f"{name}=..." for name in required)])
    return (
        f"{owner} takes {len(positional)} positional argument ({', '.join(positional)}), and got {given}. The others "
        f"are keywords: `{owner}({call})`."
    )
