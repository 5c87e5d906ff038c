"""The command line: lists, verifies and exports checkpoints, reports on runs, and writes scripts.

```
ptacc checkpoints runs/digits                          lists the checkpoints
ptacc verify runs/digits                               reads every file and checks its hash
ptacc export runs/digits digits.safetensors            writes the weights of the newest intact checkpoint
ptacc export runs/digits best.safetensors --best eval_loss             or of the best one
ptacc runs runs                                        lists the runs below a directory
ptacc report runs/digits -o digits.html                writes a page with the curves of a run
ptacc eject train:MyTrainer -o plain.py                writes the script that a composed trainer amounts to
```

Each path of checkpoints may be a URL: `ptacc verify s3://bucket/runs/digits`.

Exit codes: 0 for success; 1 if no checkpoint or run was found or one is damaged; 2 if the command failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import get_args

from ptacc.checkpoint.catalog import CheckpointEntry, choose, find_best, find_checkpoint, list_checkpoints
from ptacc.checkpoint.export import AVERAGES, check_target, exported_weights, write_weights
from ptacc.checkpoint.frozen import FROZEN
from ptacc.checkpoint.parts import MODEL, read_full_parts
from ptacc.display.numbers import format_bytes
from ptacc.display.tables import align
from ptacc.eject.command import eject as make_script
from ptacc.errors import OptionError, PtaccError
from ptacc.files.paths import parse_path, resolve_links
from ptacc.files.remote_filesystem import select_filesystem
from ptacc.report.listing import as_json as run_as_json
from ptacc.report.listing import find_runs, finite, list_runs
from ptacc.report.listing import format_table as format_runs
from ptacc.report.page import make_page
from ptacc.report.run_files import read_run
from ptacc.report.text import UNKNOWN, printable
from ptacc.run.environment import get_own_version
from ptacc.storage.manifest import Manifest
from ptacc.types.aliases import Mode
from ptacc.types.monitor import Monitor


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name. None for those of the process.

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
        # The reader of standard output has ended. Without this, Python would report an error when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (PtaccError, OSError) as error:
        print_error(str(error))
        return 2


class Options(argparse.Namespace):
    """The arguments of all commands. Each command has those of its parser."""

    command: Callable[[Options], int]
    directory: str
    key_file: Path | None
    verify: bool
    json: bool
    output: str
    page: Path
    runs: list[Path]
    averages: str | None
    force: bool
    trainer: str
    script: Path | None
    best: str | None
    mode: Mode


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="ptacc", description="Checkpoints and runs of ptacc trainers.")
    parser.add_argument("--version", action="version", version=f"ptacc {get_own_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--key-file", type=expand_file, metavar="FILE", help="file with the key of the checkpoints")
    ranking = argparse.ArgumentParser(add_help=False)
    ranking.add_argument("--best", metavar="NAME", help="the checkpoint with the best value of this name")
    ranking.add_argument("--mode", choices=get_args(Mode), default="min", help="which value is best (default: min)")

    listing = commands.add_parser("checkpoints", parents=[common, ranking], help="list checkpoints, oldest first")
    listing.add_argument("directory", type=parse_location, metavar="DIR", help="the checkpoint_dir of a trainer")
    listing.add_argument("--verify", action="store_true", help="check the hash of every file, not only the manifests")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(command=checkpoints)

    verifying = commands.add_parser("verify", parents=[common], help="check the hash of every file")
    verifying.add_argument("directory", type=parse_location, metavar="DIR", help="a checkpoint, or a directory of them")
    verifying.set_defaults(command=verify)

    exporting = commands.add_parser(
        "export", parents=[common, ranking], help="write the model's weights to a safetensors file"
    )
    exporting.add_argument(
        "directory", type=parse_location, metavar="DIR", help="a checkpoint, or a directory for its newest intact one"
    )
    exporting.add_argument("output", type=parse_location, metavar="OUT", help="the file to write")
    exporting.add_argument("--averages", choices=AVERAGES, help="export averages instead of the weights")
    exporting.add_argument("--force", action="store_true", help="overwrite OUT if it exists")
    exporting.set_defaults(command=export)

    add_run_commands(commands)

    ejecting = commands.add_parser(
        "eject", help="write a script for PyTorch and Accelerate that does what a trainer does"
    )
    ejecting.add_argument("trainer", metavar="MODULE:NAME", help="a class of trainers, a trainer, or a function of one")
    ejecting.add_argument("-o", dest="script", type=expand_file, metavar="FILE", help="default: standard output")
    ejecting.add_argument("--force", action="store_true", help="overwrite FILE if it exists")
    ejecting.set_defaults(command=eject)
    return parser


def add_run_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands that read the files of runs."""
    finding = commands.add_parser("runs", help="list the runs in a directory and below it")
    finding.add_argument("runs", type=expand_file, metavar="DIR", nargs=1, help="a directory")
    finding.add_argument("--json", action="store_true", help="print JSON")
    finding.set_defaults(command=runs)

    reporting = commands.add_parser("report", help="write a page with the curves of runs")
    reporting.add_argument(
        "runs",
        type=expand_file,
        metavar="RUN",
        nargs="+",
        help="a history file, a checkpoint_dir, or a directory of both",
    )
    reporting.add_argument(
        "-o", dest="page", type=expand_file, metavar="FILE", default=Path("report.html"), help="default: report.html"
    )
    reporting.set_defaults(command=report)


def parse_location(text: str) -> str:
    """Parse an argument that may be a URL."""
    try:
        return parse_path(text)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def expand_file(text: str) -> Path:
    """Parse an argument that is a local file."""
    return Path(text).expanduser()


# ---- the commands


def checkpoints(options: Options) -> int:
    """List the checkpoints of a directory."""
    entries = list_checkpoints(options.directory, read_key(options.key_file))
    if options.verify:
        entries = list(verified(entries))
    monitor = get_monitor(options)
    best = find_best(options.directory, entries, monitor) if monitor and entries else None
    if options.json:
        rows = [as_json(entry, best, is_verified=options.verify) for entry in entries]
        print_line(json.dumps(rows, indent=2, allow_nan=False))
    elif entries:
        for line in format_table(entries, best, is_verified=options.verify):
            print_line(line)
    return get_exit_code(entries, options.directory)


def verify(options: Options) -> int:
    """Check every file of one checkpoint, or of all in a directory."""
    entries = list_checkpoints(options.directory, read_key(options.key_file))
    width = max((len(printable(entry.title)) for entry in entries), default=0)
    found: list[CheckpointEntry] = []
    for entry in verified(entries):
        found.append(entry)
        print_line(f"{printable(entry.title):<{width}}  {printable(entry.problem) or 'intact'}")
        sys.stdout.flush()  # the next checkpoint may take minutes
    return get_exit_code(found, options.directory)


def export(options: Options) -> int:
    """Write the weights of a checkpoint to a safetensors file."""
    target = resolve_links(options.output)
    filesystem = select_filesystem(target)
    check_target(filesystem, target, overwrite=options.force)  # before the checkpoint is read
    key = read_key(options.key_file)
    # If one checkpoint is given, only the files that are exported have to be intact.
    entry = find_checkpoint(options.directory, key) or choose(
        options.directory, list_checkpoints(options.directory, key), get_monitor(options), print_skipped
    )
    snapshot = read_full_parts(entry.store, entry.store.manifest(entry.name))
    weights = exported_weights(snapshot, options.averages)
    digest = write_weights(filesystem, target, weights, overwrite=options.force)
    what = f"the {options.averages} averages" if options.averages else "the weights"
    size = format_bytes(digest.size)
    frozen = len(snapshot.get(FROZEN, {}).get(MODEL, {}))
    without = f", without {frozen} frozen tensors that the checkpoint leaves out" if frozen else ""
    print_line(f"{options.output}: {what} of {printable(entry.title)}, {len(weights)} tensors, {size}{without}")
    return 0


def runs(options: Options) -> int:
    """List the runs below a directory."""
    found, problems = list_runs(options.runs[0])
    if options.json:
        print_line(json.dumps([run_as_json(run) for run in found], indent=2, allow_nan=False))
    elif found:
        for line in format_runs(found):
            print_line(line)
    for problem in problems if found or problems else [f"no runs in {options.runs[0]}"]:
        print_error(problem)
    return int(not found or bool(problems))


def report(options: Options) -> int:
    """Write a page about runs."""
    found = [read_run(path) for given in options.runs for path in find_runs(given)]
    options.page.write_text(make_page(found), encoding="utf-8")
    print_line(f"{options.page}: {', '.join(run.title for run in found)}")
    return 0


def eject(options: Options) -> int:
    """Write the script of a trainer."""
    source, file = make_script(options.trainer), options.script
    if file is None:
        print_line(source.removesuffix("\n"))
        return 0
    if file.exists() and not options.force:
        raise OptionError(f"{file} exists. Give --force to overwrite it.")
    file.write_text(source, encoding="utf-8")
    print_line(f"{file}: {options.trainer}")
    return 0


def verified(entries: Iterable[CheckpointEntry]) -> Iterator[CheckpointEntry]:
    """Check every file of each checkpoint, and leave out those that have been removed since they were listed."""
    checked = (entry.check(files=True) for entry in entries)
    return (entry for entry in checked if not entry.is_gone)


def get_monitor(options: Options) -> Monitor | None:
    """Return the value of `--best`."""
    return None if options.best is None else Monitor(options.best, options.mode)


def print_skipped(entry: CheckpointEntry) -> None:
    """Report a damaged checkpoint."""
    print_error(f"{printable(entry.title)} is skipped: {entry.problem}")


def get_exit_code(entries: Sequence[CheckpointEntry], directory: str) -> int:
    """Return the exit code, and report if there are no checkpoints."""
    if not entries:
        is_directory = select_filesystem(directory).is_directory(directory)
        print_error(f"no checkpoints in {directory}" + ("" if is_directory else ", which is not a directory"))
    return int(not entries or any(entry.problem for entry in entries))


def read_key(file: Path | None) -> bytes | None:
    """Return the key in a file."""
    key = None if file is None else file.read_bytes().rstrip()
    if key == b"":
        raise OptionError(f"{file} is empty: it must contain the key.")
    return key


# ---- output


def format_table(entries: Sequence[CheckpointEntry], best: CheckpointEntry | None, *, is_verified: bool) -> list[str]:
    """Return the lines of a table of checkpoints, with a mark at the best one."""
    metrics = sorted({name for entry in entries if entry.manifest for name in entry.manifest.metrics})
    head = ["name", "step", "epoch", *metrics, "size", "label", "state"]
    rows = [head, *(format_row(entry, metrics, is_verified=is_verified) for entry in entries)]
    for row, entry in zip(rows[1:], entries, strict=True):
        row[-1] = f"best, {row[-1]}" if entry is best else row[-1]
    return align([[printable(cell) for cell in row] for row in rows], right=range(1, len(head) - 2))


def format_row(entry: CheckpointEntry, metrics: Sequence[str], *, is_verified: bool) -> list[str]:
    """Return the cells of one checkpoint."""
    state = entry.problem or ("intact" if is_verified else "manifest intact, files not read")
    manifest = entry.manifest
    if manifest is None:
        return [entry.title, *[UNKNOWN] * (4 + len(metrics)), state]
    values = [f"{manifest.metrics[name]:.6g}" if name in manifest.metrics else UNKNOWN for name in metrics]
    size, label = format_bytes(total_size(manifest)), manifest.label or UNKNOWN
    return [entry.title, str(manifest.step), str(manifest.epoch), *values, size, label, state]


def as_json(entry: CheckpointEntry, best: CheckpointEntry | None, *, is_verified: bool) -> dict[str, object]:
    """Return a checkpoint as JSON. Infinity and NaN, which JSON does not have, become strings."""
    fields: dict[str, object] = {"name": entry.title, "checked": "files" if is_verified else "manifest"}
    if (manifest := entry.manifest) is not None:
        metrics = {name: finite(value) for name, value in manifest.metrics.items()}
        fields |= {"run": manifest.run, "step": manifest.step, "epoch": manifest.epoch, "bytes": total_size(manifest)}
        fields |= {"label": manifest.label, "metrics": metrics}
    marks = {} if best is None else {"best": entry is best}
    return {**fields, **marks, "problem": entry.problem or None}


def total_size(manifest: Manifest) -> int:
    """Return the size of a checkpoint in bytes."""
    return sum(file.size for file in manifest.files.values())


def print_line(text: str) -> None:
    """Write to standard output, with escapes for characters that its encoding does not have."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def print_error(text: str) -> None:
    """Write to standard error."""
    sys.stderr.write(f"ptacc: {text}\n")
