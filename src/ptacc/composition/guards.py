"""Class-definition checks that type checkers cannot make; each error includes the fix.

The checks read `__mro__` and `__dict__` and never call `issubclass`: while a class is being created, `issubclass` can
return a wrong result for abstract base classes, and the result is cached.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Collection, Iterator, Mapping
from types import CodeType

from ptacc.composition.fields import (
    check_members_against_options,
    check_near_misses_of_options,
    check_own_options,
    own_annotations,
    unwrap_function,
)
from ptacc.composition.misnamed import EVENTS_ELSEWHERE, METHODS_ELSEWHERE, find_near_miss
from ptacc.composition.roles import get_role, is_mixin
from ptacc.composition.type_arguments import describe_type_mismatch
from ptacc.errors import CompositionError
from ptacc.validation import did_you_mean

COOPERATIVE_SHAPES = frozenset({"event", "around", "fold", "any-of"})
REPLACEABLE_SHAPES = frozenset({"default", "factory"})
FALLBACK_HOOKS = frozenset({"make_engine"})
"""Replaceable hooks whose overrides call `super()` only as a fallback: two overrides still exclude each other."""
TYPE_CHECKER_MARKERS = frozenset({"_role", "_mixins_must_come_before_the_loop", "_batch_types_must_match_the_loop"})
"""Defined in several classes on purpose, for type checkers to compare: see `Mixin` and `BatchMixin`."""
CALLED_PER_CLASS = frozenset({"check_options"})
"""Methods that are called on every class in the MRO, so that definitions do not conflict."""
PYTHON_INTERNALS = frozenset({"_abc_impl", "_is_protocol", "_is_runtime_protocol"})
_SUPER_CALL = {
    "event": "super().{name}({arguments})",
    "around": "with super().{name}({arguments}): yield",
    "fold": "super().{name}({arguments})",
    "any-of": "return super().{name}({arguments}) or ...",
}


def check_class_statement(cls: type) -> None:
    """Raise `CompositionError` for mistakes in one class body."""
    _check_no_constructor(cls)
    check_own_options(cls)
    check_members_against_options(cls)
    check_near_misses_of_options(cls)
    _check_no_final_override(cls)
    _check_hooks(cls)


def check_composition(cls: type, root: type) -> None:
    """Raise `CompositionError` for bases that cannot be combined. `root` is `Composable`."""
    _check_foreign_bases(cls, root)
    _check_name_conflicts(cls)
    _check_competing_overrides(cls)
    _check_mixin_order(cls)
    if mismatch := describe_type_mismatch(cls):
        raise CompositionError(mismatch)


# ---- one class body


def _check_no_constructor(cls: type) -> None:
    for name in ("__init__", "__post_init__"):
        if name in cls.__dict__:
            raise CompositionError(
                f"{cls.__name__}.{name}: the constructor is generated from the options, which are the annotated names "
                "of the class body. Write `name: type = default` for an option, `check_options(self)` for checks, and "
                "`on_run_start(self)` to set up a run."
            )
    if not calls_super(cls.__dict__.get("__init_subclass__")):
        raise CompositionError(
            f"{cls.__name__}.__init_subclass__: never calls super(), so subclasses would have no options. "
            "Add `super().__init_subclass__(**keywords)`."
        )


def check_hooks_are_declared(cls: type, known: Collection[str], elsewhere: Mapping[str, str]) -> None:
    """Raise `CompositionError` for a method that looks like a hook and that is never called.

    That is an `on_...` or `around_...` method that no base declares, a near miss of a name that is called, or a hook
    of another trainer. If the class also defines the method that could be meant, the name is accepted.

    `known` are names without these prefixes that are called. `elsewhere` are names that are not called, with what they
    are here: the name of a hook, or a description.
    """
    declared = {n for base in cls.__mro__[1:] for n in base.__dict__ if n.startswith(("on_", "around_"))}
    for name in _new_methods(cls):
        if name.startswith(("on_", "around_")):
            event = EVENTS_ELSEWHERE.get(name, name)
            here = event if event in declared else elsewhere.get(event)
        else:
            here = elsewhere.get(name) or find_near_miss(name, known)
            if here is None or here in cls.__dict__:
                continue
        hint = did_you_mean(name, declared)
        if here is not None:
            hint = f"Did you mean `{here}`? " if here.isidentifier() else f"Here it is {here}. "
        raise CompositionError(
            f"{cls.__name__}.{name}: no base declares this hook, so it would never be called. {hint}Otherwise give it "
            "another name, or decorate it with `@hook(...)` to declare a hook or a method that you call yourself."
        )


def _check_no_final_override(cls: type) -> None:
    for name in cls.__dict__:
        if any(getattr(base.__dict__.get(name), "__final__", False) for base in cls.__mro__[1:]):
            raise CompositionError(
                f"{cls.__name__}.{name}: {name}() is final, and a run would not call this method. Override a hook, or "
                "give the method another name."
            )


def _new_methods(cls: type) -> Iterator[str]:
    """Yield the names of methods in a class body that no base has, and that are not decorated with `@hook(...)`."""
    annotated = own_annotations(cls)
    for name, value in cls.__dict__.items():
        is_new = not any(name in base.__dict__ for base in cls.__mro__[1:])
        if is_new and name not in annotated and _is_callable(value) and get_hook_shape(value) is None:
            yield name


def _check_hooks(cls: type) -> None:
    if get_role(cls) != "core":  # the core's `on_main_process` is not a hook
        members = [member for base in cls.__mro__[1:] for member in base.__dict__.items()]
        hooks = {n for n, value in members if get_hook_shape(value) or getattr(value, "__isabstractmethod__", False)}
        check_hooks_are_declared(cls, hooks | CALLED_PER_CLASS, METHODS_ELSEWHERE)
    for name, value in cls.__dict__.items():
        declaring = next((base for base in cls.__mro__[1:] if get_hook_shape(base.__dict__.get(name))), None)
        if declaring is None:
            continue
        shape = str(get_hook_shape(declaring.__dict__[name]))
        if get_hook_shape(value) not in (None, shape):
            raise CompositionError(
                f"{cls.__name__}.{name}: {declaring.__name__} declares this hook already, as {shape!r}, and an "
                "override cannot change its shape. Leave out `@hook(...)`."
            )
        if shape in COOPERATIVE_SHAPES and not _replaces_super(value):
            _check_cooperative_override(cls, name, value, shape)
        if shape in REPLACEABLE_SHAPES and not _replaces_super(value) and not calls_super(value, name):
            _check_refinements_run(cls, name)


def _check_cooperative_override(cls: type, name: str, value: object, shape: str) -> None:
    """Raise `CompositionError` for an override of a cooperative hook that cannot run, or that never calls `super()`."""
    if not inspect.isfunction(value):
        raise CompositionError(
            f"{cls.__name__}.{name}: a hook must be a method, and this is a {type(value).__name__}. "
            f"Write `def {name}(self, ...)`, and call `super().{name}(...)` in it."
        )
    if inspect.iscoroutinefunction(value) or inspect.isasyncgenfunction(value):
        raise CompositionError(
            f"{cls.__name__}.{name}: hooks are called without await, so its body would never run. Write `def`, not "
            "`async def`."
        )
    if inspect.isgeneratorfunction(value):
        fix = "Decorate it with `@contextlib.contextmanager`." if shape == "around" else "Remove the `yield`."
        raise CompositionError(
            f"{cls.__name__}.{name}: it is a generator function, so calling it would not run its body. {fix}"
        )
    if not calls_super(value, name):
        code = inspect.unwrap(value).__code__
        arguments = ", ".join(code.co_varnames[1 : code.co_argcount])
        call = _SUPER_CALL[shape].format(name=name, arguments=arguments)
        raise CompositionError(
            f"{cls.__name__}.{name}: never calls super().{name}, so overrides of the classes behind it would not run. "
            f"Add `{call}`, or decorate it with `@replaces_super` to replace them on purpose."
        )


def _check_refinements_run(cls: type, name: str) -> None:
    """Raise `CompositionError` for a trainer with a mixin that refines `name`, which the trainer itself replaces."""
    mixins = (base for base in cls.__mro__[1:] if is_mixin(base) and name in base.__dict__)
    mixin = next((base for base in mixins if calls_super(base.__dict__[name], name)), None)
    if mixin is None or is_mixin(cls):
        return
    composed = _get_composed_name(cls, mixin)
    raise CompositionError(
        f"{cls.__name__}.{name}: never calls super().{name}, so the {name} of {composed} would not run. "
        f"Define {name} in a class of its own, and put {composed} before it: `class {cls.__name__}({composed}, "
        f"MyLoop)`. If {cls.__name__}.{name} replaces both on purpose, decorate it with `@replaces_super`."
    )


def calls_super(value: object, name: str = "") -> bool:
    """Return whether a method calls `super()`; decorators are unwrapped. True for a member that is not a function.

    Args:
        value: A member of a class.
        name: The method of `super()` that must be called; any, if empty.
    """
    function = unwrap_function(value)
    if function is None:
        return True
    code = inspect.unwrap(function).__code__
    names = set(_names_in(code))
    # In a class body, `super` makes `__class__` a free variable. A function defined elsewhere calls `super(cls, self)`.
    has_super = "__class__" in code.co_freevars or "super" in names
    return has_super and (not name or not names.isdisjoint({name, "getattr"}))


def get_hook_shape(value: object) -> str | None:
    """Return the shape that `@hook(...)` declares for a member of a class, or None."""
    return getattr(unwrap_function(value), "__ptacc_shape__", None)


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _replaces_super(value: object) -> bool:
    return any(getattr(member, "__ptacc_replaces__", False) for member in (value, unwrap_function(value)))


def _is_callable(value: object) -> bool:
    if isinstance(value, type | property | functools.cached_property):
        return False
    return callable(value) or isinstance(value, classmethod)


# ---- the bases together


def _check_foreign_bases(cls: type, root: type) -> None:
    for base in cls.__mro__[1:]:
        if root in base.__mro__ or base is object or _is_protocol(base):
            continue
        own = {"__init__", "__post_init__"} & base.__dict__.keys()
        if own and (own != {"__init__"} or "__dataclass_fields__" not in base.__dict__):
            raise CompositionError(
                f"{cls.__name__}: {base.__name__}.{min(own)} would never run, since the constructor is generated from "
                f"the options. Derive {base.__name__} from Mixin and turn its arguments into options, or store an "
                "instance of it in an option."
            )


def _check_name_conflicts(cls: type) -> None:
    owners: dict[str, list[type]] = {}
    for base in cls.__mro__:
        if base.__module__ in {"builtins", "abc", "typing", "typing_extensions"}:
            continue
        for name in {**base.__dict__, **own_annotations(base)}:
            if not (name.startswith("__") or name in TYPE_CHECKER_MARKERS | CALLED_PER_CLASS | PYTHON_INTERNALS):
                owners.setdefault(name, []).append(base)
    for name, classes in owners.items():
        for first, second in itertools.combinations(classes, 2):
            if not any(c in first.__mro__ and c in second.__mro__ for c in classes):
                raise CompositionError(
                    f"{cls.__name__}: {name} is declared by {first.__name__} and by {second.__name__}, which are "
                    f"unrelated, and {first.__name__}'s would silently win. {_suggest_fix(first, second)}"
                )


def _check_competing_overrides(cls: type) -> None:
    """Raise `CompositionError` for two mixins that both replace a hook with one result, such as `make_engine`."""
    mixins = [base for base in cls.__mro__ if is_mixin(base)]
    for first, second in itertools.combinations(mixins, 2):
        if second in first.__mro__:
            continue
        for name in first.__dict__.keys() & second.__dict__.keys():
            shape = next(filter(None, (get_hook_shape(base.__dict__.get(name)) for base in second.__mro__)), None)
            value = first.__dict__[name]
            refines = calls_super(value, name) and name not in FALLBACK_HOOKS
            if shape in REPLACEABLE_SHAPES and not refines and not _replaces_super(value):
                names = " and ".join(_get_composed_name(cls, mixin) for mixin in (first, second))
                raise CompositionError(
                    f"{cls.__name__}: {names} both define {name}(), and only one of them can take effect. Compose one "
                    "of them."
                )


def _get_composed_name(cls: type, mixin: type) -> str:
    """Return the name of the first mixin of `cls` that is or derives from `mixin`, which users know."""
    return next(base.__name__ for base in cls.__mro__[1:] if mixin in base.__mro__ and is_mixin(base))


def _suggest_fix(first: type, second: type) -> str:
    protocol = next(filter(_is_protocol, (first, second)), None)
    if protocol is None:
        return "Rename one of them, or declare it in a common base."
    return f"Leave {protocol.__name__} out of the bases: a class conforms to a protocol by having its members."


def _is_protocol(cls: type) -> bool:
    return bool(cls.__dict__.get("_is_protocol", False))


def _check_mixin_order(cls: type) -> None:
    loop = next((base for base in cls.__mro__ if get_role(base) == "loop"), None)
    if loop is None:
        return
    trainer = next(base for base in (*cls.__bases__, cls) if loop in base.__mro__)
    late = next(filter(is_mixin, cls.__mro__[cls.__mro__.index(loop) :]), None)
    if late is not None:
        bases = sorted(cls.__bases__, key=lambda base: loop in base.__mro__)
        raise CompositionError(
            f"{cls.__name__}: {late.__name__} comes after {trainer.__name__}, whose methods would override its hooks. "
            f"Put it before: `class {cls.__name__}({', '.join(base.__name__ for base in bases)})`."
        )
