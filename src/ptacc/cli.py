"""The command line: what checkpoints there are, whether they are whole, and the weights out of one of them.

```
ptacc checkpoints runs/digits                          lists them
ptacc verify runs/digits                               reads and hashes every file of them
ptacc export runs/digits digits.safetensors            writes the weights of the newest that is whole
```

Each place may be a URL: `ptacc verify s3://bucket/runs/digits`.

Exit codes: 0 for all well; 1 where checkpoints are damaged, or there are none; 2 for what cannot be done.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from ptacc.checkpoint.catalog import CheckpointEntry, found_at, found_itself
from ptacc.checkpoint.export import AVERAGES, check_target, exported_weights, write_weights
from ptacc.checkpoint.parts import read_whole
from ptacc.checkpoint.storage.manifest import Manifest
from ptacc.checkpoint.storage.remote_filesystem import parse_path, select_filesystem
from ptacc.errors import CheckpointError, OptionError, PtaccError

NOT_KNOWN = "-"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Those after the program's name; None for the process's own.

    Returns:
        The exit code.
    """
    try:
        try:
            options = make_parser().parse_args(arguments, namespace=Options())
            return options.command(options)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Nobody reads on. The interpreter flushes once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (PtaccError, OSError) as error:
        warn(str(error))
        return 2


class Options(argparse.Namespace):
    """The arguments of all commands; each command has those that its parser has."""

    command: Callable[[Options], int]
    directory: Path
    key_file: Path | None
    verify: bool
    json: bool
    output: Path
    averages: str | None
    force: bool


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="ptacc", description="Look after the checkpoints of ptacc's trainers.")
    parser.add_argument("--version", action="version", version=f"ptacc {installed_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--key-file", type=Path, metavar="FILE", help="the key that the checkpoints are signed with")

    listing = commands.add_parser("checkpoints", parents=[common], help="list the checkpoints, oldest first")
    listing.add_argument("directory", type=place, metavar="DIR", help="the trainer's checkpoint_dir")
    listing.add_argument("--verify", action="store_true", help="read and hash every file, not the manifests alone")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(command=checkpoints)

    verifying = commands.add_parser("verify", parents=[common], help="read and hash every file of checkpoints")
    verifying.add_argument("directory", type=place, metavar="DIR", help="a checkpoint, or a directory of them")
    verifying.set_defaults(command=verify)

    exporting = commands.add_parser("export", parents=[common], help="write the model's weights to a safetensors file")
    exporting.add_argument(
        "directory", type=place, metavar="DIR", help="a checkpoint, or a directory: its newest whole one"
    )
    exporting.add_argument("output", type=place, metavar="OUT", help="the file to write")
    exporting.add_argument("--averages", choices=AVERAGES, help="export these averages in the place of the weights")
    exporting.add_argument("--force", action="store_true", help="replace OUT if it is there")
    exporting.set_defaults(command=export)
    return parser


def place(text: str) -> Path:
    """Return the path of an argument, which may be a URL."""
    try:
        return parse_path(text)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def installed_version() -> str:
    """Return the version of the installed package."""
    try:
        return metadata.version("ptacc")
    except metadata.PackageNotFoundError:
        return "(not installed)"


# ---- the commands


def checkpoints(options: Options) -> int:
    """List the checkpoints of a directory."""
    found = found_at(options.directory, key_from(options.key_file))
    if options.verify:
        found = [checked for one in found if not (checked := one.verified()).is_gone]
    if options.json:
        say(json.dumps([as_json(one, is_verified=options.verify) for one in found], indent=2, allow_nan=False))
    elif found:
        for line in format_table(found, is_verified=options.verify):
            say(line)
    return exit_code(found, options.directory)


def verify(options: Options) -> int:
    """Check every file of one checkpoint or of all in a directory."""
    found = found_at(options.directory, key_from(options.key_file))
    width = max((len(printable(one.place)) for one in found), default=0)
    checked: list[CheckpointEntry] = []
    for one in found:
        one = one.verified()
        if not one.is_gone:
            checked.append(one)
            say(f"{printable(one.place):<{width}}  {printable(one.problem) or 'whole'}")
            sys.stdout.flush()  # the next may take minutes
    return exit_code(checked, options.directory)


def export(options: Options) -> int:
    """Write the weights of a checkpoint to a safetensors file."""
    check_target(options.output, overwrite=options.force)  # before anything large is read
    key = key_from(options.key_file)
    # Of one that was asked for, no more need be whole than is exported.
    chosen = found_itself(options.directory, key) or find_newest_verified(
        found_at(options.directory, key), options.directory
    )
    manifest = chosen.store.manifest(chosen.name)
    weights = exported_weights(read_whole(chosen.store, manifest), options.averages)
    written = write_weights(select_filesystem(options.output), options.output, weights, overwrite=options.force)
    what = f"the {options.averages} averages" if options.averages else "the weights"
    size = human_size(written.size)
    say(f"{options.output}: {what} of {printable(chosen.place)}, {len(weights)} tensors, {size}")
    return 0


def find_newest_verified(found: Sequence[CheckpointEntry], directory: Path) -> CheckpointEntry:
    """Return the newest checkpoint that is whole, having said which newer ones are not."""
    for one in reversed(found):
        one = one.verified()
        if not one.problem:
            return one
        if not one.is_gone:
            warn(f"{printable(one.place)} is passed over: {one.problem}")
    raise CheckpointError(f"There is no whole checkpoint in {directory}.")


def exit_code(found: Sequence[CheckpointEntry], directory: Path) -> int:
    """Return the exit code, having said so if there are no checkpoints."""
    if not found:
        warn(f"no checkpoints in {directory}" + ("" if directory.is_dir() else ", which is no directory"))
    return int(not found or any(one.problem for one in found))


def key_from(file: Path | None) -> bytes | None:
    """Return the key in a file."""
    key = None if file is None else file.read_bytes().rstrip()
    if key == b"":
        raise OptionError(f"{file} holds no key: it is empty.")
    return key


# ---- what is printed


def format_table(found: Sequence[CheckpointEntry], *, is_verified: bool) -> list[str]:
    """Return the lines of a table of checkpoints."""
    metrics = sorted({name for one in found if one.manifest for name in one.manifest.metrics})
    head = ["name", "step", "epoch", *metrics, "size", "label", "state"]
    rows = [head, *(format_row(one, metrics, is_verified=is_verified) for one in found)]
    columns = [[printable(cell) for cell in column] for column in zip(*rows, strict=True)]
    for title, column in zip(head[:-1], columns, strict=False):  # the last ends where its lines do
        width = max(map(len, column))
        column[:] = [f"{cell:<{width}}" if title in {"name", "label"} else f"{cell:>{width}}" for cell in column]
    return ["  ".join(row) for row in zip(*columns, strict=True)]


def format_row(found: CheckpointEntry, metrics: Sequence[str], *, is_verified: bool) -> list[str]:
    """Return the cells of one checkpoint."""
    state = found.problem or ("whole" if is_verified else "manifest whole, files not read")
    here = found.manifest
    if here is None:
        return [found.place, *[NOT_KNOWN] * (4 + len(metrics)), state]
    values = [f"{here.metrics[name]:.6g}" if name in here.metrics else NOT_KNOWN for name in metrics]
    size = human_size(total_size(here))
    return [found.place, str(here.step), str(here.epoch), *values, size, here.label or NOT_KNOWN, state]


def as_json(found: CheckpointEntry, *, is_verified: bool) -> dict[str, object]:
    """Return a checkpoint for JSON, which knows no infinity and no NaN: they are texts there."""
    here = found.manifest
    said: dict[str, object] = {"name": found.place, "checked": "files" if is_verified else "manifest"}
    if here is not None:
        metrics = {name: value if math.isfinite(value) else repr(value) for name, value in here.metrics.items()}
        said |= {"run": here.run, "step": here.step, "epoch": here.epoch, "bytes": total_size(here)}
        said |= {"label": here.label, "metrics": metrics}
    return {**said, "problem": found.problem or None}


def total_size(manifest: Manifest) -> int:
    """Return the number of bytes of a checkpoint's files."""
    return sum(file.size for file in manifest.files.values())


def human_size(size: float) -> str:
    """Return a number of bytes in units that people read.

    Example:
        >>> human_size(1023), human_size(1536)
        ('1023 B', '1.5 KiB')
    """
    if size < 1024:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"


def printable(text: str) -> str:
    """Return a text that keeps to its line, and tells the terminal nothing."""
    return text if text.isprintable() else repr(text)


def say(text: str) -> None:
    """Write to standard output, in whatever encoding it has."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def warn(text: str) -> None:
    """Write to standard error."""
    sys.stderr.write(f"ptacc: {text}\n")
