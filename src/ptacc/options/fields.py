"""A dataclass of the options of a trainer that a text can express."""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import operator
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, make_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from ptacc.core.hooks import TrainerCore
from ptacc.loop.loop import TrainingLoop
from ptacc.types.arguments import DEFAULT_CADENCE, DEFAULT_STOP_CHECK_EVERY, RunOptions, TrainOptions
from ptacc.types.progress import Epochs, Items, Minutes, Steps

SIMPLE = (bool, int, float, str, Path, NoneType)
CADENCES = (Steps, Epochs, Minutes, Items)
SECTION = r"^{title}:\n(?P<body>(?:[ ].*\n?|\n)*)"
ENTRY = re.compile(r"^    (?P<name>\w+): (?P<text>.*(?:\n        .*)*)", re.MULTILINE)
TRAIN_DEFAULTS: dict[str, Any] = {
    "num_epochs": None,
    "max_steps": None,
    "max_items": None,
    "max_time": None,
    "per_device_batch_size": None,
    "evaluate_every": DEFAULT_CADENCE,
    "evaluate_first": False,
    "limit_batches": None,
    "stop_check_every": DEFAULT_STOP_CHECK_EVERY,
    "data_is_sharded": False,
    "seed_every_batch": False,
}
"""Arguments of `train` that a text can express, with their defaults."""


@dataclass(frozen=True, kw_only=True)
class CommandLineOptions:
    """What a command line or a file can set of a trainer and of its run: the base class of what `options` returns."""

    _train_names: ClassVar[frozenset[str]] = frozenset()

    def of_trainer(self) -> dict[str, Any]:
        """Return the keywords of the trainer that differ from its defaults."""
        return self._given(of_train=False)

    def of_train(self) -> dict[str, Any]:
        """Return the keywords of `train` that differ from its defaults. `num_epochs` and `max_steps` are among them."""
        return {"num_epochs": None, "max_steps": None} | self._given(of_train=True)

    def _given(self, *, of_train: bool) -> dict[str, Any]:
        return {
            option.name: value
            for option in dataclasses.fields(self)
            if (option.name in self._train_names) == of_train
            and not same(value := getattr(self, option.name), default_of(option))
        }


def options(trainer: type[TrainerCore]) -> type[CommandLineOptions]:
    """Return a dataclass with the options of a trainer that a text can express, and such arguments of `train`.

    Types are numbers, texts, paths, choices, cadences, and sequences of them. Models, optimizers, functions and
    mappings are left to the script. The help of each option is in the metadata of its field, as `help`.

    Args:
        trainer: The class of the trainer.
    """
    texts = read_texts(trainer)
    made = [(name, kind, described(default, texts.get(name, ""))) for name, kind, default in trainer_options(trainer)]
    types = get_type_hints(RunOptions)
    train_options = [
        (name, simplify(types[name]), value) for name, value in TRAIN_DEFAULTS.items() if name not in texts
    ]
    texts |= read_section(TrainOptions, "Keys") | read_section(TrainingLoop.train, "Args")
    made += [(name, kind, described(default, texts.get(name, ""))) for name, kind, default in train_options]
    names = frozenset(name for name, *_ in train_options)
    return make_dataclass(
        f"{trainer.__name__}Options",
        made,
        bases=(CommandLineOptions,),
        namespace={"_train_names": names, "__doc__": f"Options of {trainer.__name__}, and of its run."},
        frozen=True,
        kw_only=True,
    )


def trainer_options(trainer: type[TrainerCore]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, the type and the default of each option of a trainer that a text can express."""
    types = get_type_hints(trainer.__init__)
    for option in dataclasses.fields(trainer):
        kind = simplify(types.get(option.name))
        if option.init and option.repr and kind is not None:
            yield option.name, kind, default_of(option)


def default_of(option: Field[Any]) -> Any:
    """Return the default of a field, `MISSING` if it has none."""
    return option.default if option.default_factory is MISSING else option.default_factory()


def described(default: Any, text: str) -> Any:
    """Return a field with a help text."""
    metadata = {"help": text}
    if type(default).__hash__ is None:  # dataclass refuses mutable defaults
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


def same(value: object, default: object) -> bool:
    """Return whether a value is a default."""
    return value == default and isinstance(value, bool) == isinstance(default, bool)


# ---- types


def simplify(kind: Any) -> Any:
    """Return the part of a type that a text can express; None if there is no such part besides None.

    Example:
        >>> simplify(str | os.PathLike[str] | None), simplify(Sequence[int]), simplify(dict[str, int])
        (str | None, tuple[int, ...], None)
    """
    if get_origin(kind) in (Union, UnionType):
        parts = [simplify(part) for part in get_args(kind)]
        kept = tuple(dict.fromkeys(part for part in parts if part is not None))
        return functools.reduce(operator.or_, kept) if set(kept) - {NoneType} else None
    if get_origin(kind) in (Sequence, Collection, tuple):
        items = {simplify(part) for part in get_args(kind) if part is not Ellipsis}
        return tuple.__class_getitem__((items.pop(), ...)) if len(items) == 1 and items <= {int, float, str} else None
    if kind is os.PathLike or get_origin(kind) is os.PathLike:
        return str
    is_enum = isinstance(kind, type) and issubclass(kind, enum.Enum)
    return kind if kind in (*SIMPLE, *CADENCES) or get_origin(kind) is Literal or is_enum else None


# ---- texts


def read_texts(trainer: type) -> dict[str, str]:
    """Return the help of each option of a trainer, from the docstring of the class that declares it."""
    texts: dict[str, str] = {}
    for base in reversed(trainer.__mro__):
        texts |= read_section(base, "Options")
    return texts


def read_section(documented: object, title: str) -> dict[str, str]:
    """Return the entries of a section of an object's own docstring, each on one line."""
    text = inspect.cleandoc(getattr(documented, "__doc__", None) or "") + "\n"
    section = re.search(SECTION.format(title=title), text, re.MULTILINE)
    entries = ENTRY.finditer(section["body"]) if section else ()
    return {entry["name"]: " ".join(entry["text"].split()) for entry in entries}
