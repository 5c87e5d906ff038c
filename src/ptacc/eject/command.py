"""`ptacc eject`: writes the script of a trainer."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Generator
from inspect import Parameter, signature
from types import FunctionType

from ptacc.eject.fragment import Target
from ptacc.eject.script import make_script
from ptacc.errors import OptionError
from ptacc.loop.loop import TrainingLoop
from ptacc.validation import did_you_mean, value_text


def eject(name: str) -> str:
    """Return the script of a trainer.

    Args:
        name: `module:attribute`. The attribute is a class of trainers, a trainer, or a function without arguments that
            returns a trainer. The module is imported, from the current directory, too.

    Raises:
        OptionError: There is no such attribute, or it is not a trainer. Or the trainer has several updates in a step.
    """
    path, _, attribute = name.partition(":")
    if not path or not attribute.isidentifier():
        raise OptionError(
            f"{name!r} is not the name of a trainer: it must be module:attribute, such as train:MyTrainer."
        )
    with imported_from_here():
        return make_script(make_target(name, load(path, attribute)))


@contextlib.contextmanager
def imported_from_here() -> Generator[None]:
    """Import modules of the current directory within the block."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")


def load(path: str, attribute: str) -> object:
    """Return an attribute of a module."""
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise
        raise OptionError(f"There is no module {error.name!r} in this directory or among the packages.") from error
    if not hasattr(module, attribute):
        raise OptionError(f"The module {path} has no {attribute!r}. {did_you_mean(attribute, list(vars(module)))}")
    found: object = getattr(module, attribute)
    return found


def make_target(name: str, found: object) -> Target:
    """Return the trainer that an attribute is, or returns."""
    if isinstance(found, type) and issubclass(found, TrainingLoop):
        return Target(found, name)
    trainer = found() if isinstance(found, FunctionType) and not has_required(found) else found
    if not isinstance(trainer, TrainingLoop):
        raise OptionError(
            f"{name} is {value_text(trainer)}, which is not a trainer. Give a class of trainers, a trainer, or a "
            "function that returns one and needs no arguments."
        )
    return Target(type(trainer), name, trainer)


def has_required(function: FunctionType) -> bool:
    """Return whether a function has to be called with arguments."""
    kinds = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return any(p.default is Parameter.empty and p.kind not in kinds for p in signature(function).parameters.values())
