"""Reading options from the command line and from files, with tyro."""

from __future__ import annotations

import dataclasses
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args, overload

from ptacc.core.hooks import TrainerCore
from ptacc.errors import OptionError
from ptacc.options.fields import CADENCES, CommandLineOptions, options
from ptacc.types.progress import Cadence, Epochs, Items, Minutes, Steps
from ptacc.validation import did_you_mean, with_install_note

OwnT = TypeVar("OwnT")
CADENCE = re.compile(r"(?P<number>[\d_.]+)\s*(?P<unit>steps?|epochs?|minutes?|items?)")
UNITS: dict[str, type[Cadence]] = {"step": Steps, "epoch": Epochs, "minute": Minutes, "item": Items}
CONFIG = "--config"


@overload
def parse_options(trainer: type[TrainerCore], *, arguments: Sequence[str] | None = None) -> CommandLineOptions: ...
@overload
def parse_options(
    trainer: type[TrainerCore], own: type[OwnT], *, arguments: Sequence[str] | None = None
) -> tuple[CommandLineOptions, OwnT]: ...
def parse_options(
    trainer: type[TrainerCore], own: type[Any] | None = None, *, arguments: Sequence[str] | None = None
) -> CommandLineOptions | tuple[CommandLineOptions, Any]:
    """Parse the command line. `--help` lists all options; `--config FILE` reads some from a YAML or TOML file.

    What the command line gives replaces what the file gives. Cadences are texts such as `500steps`, `2epochs` or
    `10minutes`. An unknown option or a wrong value ends the process with a message.

    Args:
        trainer: The class of the trainer.
        own: A dataclass of further options of the script.
        arguments: The arguments, by default those of the process.

    Returns:
        The options, and an instance of `own` if it is given.

    Raises:
        OptionError: The file has an unknown option, or is neither YAML nor TOML.
        ModuleNotFoundError: tyro is not installed.
    """
    with with_install_note("parse_options()", "ptacc[cli]"):
        import tyro

    given = sys.argv[1:] if arguments is None else list(arguments)
    kind, flat = annotate(options(trainer), tyro), cast(Any, tyro.conf.OmitArgPrefixes)
    parts: list[tuple[str, Any]] = [("trainer", flat[kind]), *([] if own is None else [("own", flat[own])])]
    both = make_dataclass("Options", parts)
    known = {option.name for part in (kind, own) if part is not None for option in dataclasses.fields(part)}
    description = f"Options of {trainer.__name__}. {CONFIG} FILE reads options from a YAML or TOML file."
    parsed: Any = tyro.cli(both, args=[*expand_config(given, known)], description=description)
    given_options = cast(CommandLineOptions, parsed.trainer)
    return given_options if own is None else (given_options, parsed.own)


def annotate(kind: type[CommandLineOptions], tyro: Any) -> type[CommandLineOptions]:
    """Return a dataclass whose fields have the help of their metadata, and whose cadences are read from texts."""
    spec = tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="500steps|2epochs|10minutes|1000items|none",
        instance_from_str=lambda texts: parse_cadence(texts[0]),
        is_instance=lambda value: value is None or isinstance(value, Cadence),
        str_from_instance=lambda value: [format_cadence(value)],
    )
    made = []
    for option in dataclasses.fields(kind):
        is_cadence = any(part in CADENCES for part in (option.type, *get_args(option.type)))
        marks = [spec] if is_cadence else []
        made.append((option.name, Annotated[option.type, *marks, tyro.conf.arg(help=option.metadata["help"])], option))
    return make_dataclass(kind.__name__, made, bases=(kind,), frozen=True, kw_only=True)


# ---- cadences


def parse_cadence(text: str) -> Cadence | None:
    """Return the cadence of a text.

    Example:
        >>> parse_cadence("500steps"), parse_cadence("1 epoch"), parse_cadence("2.5 minutes"), parse_cadence("none")
        (Steps(n=500), Epochs(n=1), Minutes(n=2.5), None)
    """
    if text.lower() == "none":
        return None
    match = CADENCE.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is not a cadence: write 500steps, 2epochs, 10minutes, 1000items or none")
    unit = UNITS[match["unit"].removesuffix("s")]
    try:
        return unit(float(match["number"]) if unit in (Minutes, Items) else int(match["number"]))  # type: ignore[arg-type]
    except OptionError as error:
        raise ValueError(str(error)) from error


def format_cadence(cadence: Cadence | None) -> str:
    """Return the text of a cadence.

    Example:
        >>> format_cadence(Steps(500)), format_cadence(None)
        ('500steps', 'none')
    """
    if cadence is None:
        return "none"
    unit = type(cadence).__name__.lower()
    return f"{cadence.n:.12g}{unit.removesuffix('s') if cadence.n == 1 else unit}"


# ---- files


def expand_config(arguments: Sequence[str], known: set[str]) -> Iterator[str]:
    """Yield the arguments, with those of the file first that `--config` names."""
    rest = list(arguments)
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == CONFIG:
            end = index + 1 if equals else index + 2
            if end > len(arguments):
                raise OptionError(f"{CONFIG}: give a YAML or TOML file.")
            yield from file_arguments(Path(value if equals else arguments[index + 1]), known)
            del rest[index:end]
            break
    yield from rest


def file_arguments(path: Path, known: set[str]) -> Iterator[str]:
    """Yield the options of a file as arguments.

    Raises:
        OptionError: The file has another ending, or an option that is unknown.
    """
    for key, value in read_file(path).items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise OptionError(f"{path}: there is no option {key!r}. {did_you_mean(name, known)}".rstrip())
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        elif isinstance(value, list):
            yield from (f"--{flag}", *map(str, value))
        else:
            yield from (f"--{flag}", str(value))


def read_file(path: Path) -> dict[str, Any]:
    """Return the options of a YAML or TOML file."""
    if path.suffix == ".toml":
        content: Any = tomllib.loads(path.read_text(encoding="utf-8"))
    elif path.suffix in (".yaml", ".yml"):
        import yaml

        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    else:
        raise OptionError(f"{CONFIG} {path}: must end in .yaml, .yml or .toml.")
    if not isinstance(content, dict):
        raise OptionError(f"{path}: must map names of options to values.")
    return content
