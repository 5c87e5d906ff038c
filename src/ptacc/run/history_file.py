"""An append-only file of JSON lines, whose verified length is part of a checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ptacc.errors import DamagedCheckpointError
from ptacc.types.protocols import StateDict

INFINITY = "\0infinity"
"""Marks an infinity in text that becomes JSON."""


class HistoryFile:
    """A file to which a run appends lines. Lines of earlier runs stay.

    Its state is the position of the run's lines with their hash. A resumed run verifies the hash, and removes the lines
    written after the checkpoint.

    Args:
        path: The file, which is created with its directory at the first line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start: int | None = None
        self._length = 0
        self._digest = hashlib.sha256()

    def append(self, records: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Append records, each with its kind."""
        text = "".join(to_json({"kind": kind, **record}) + "\n" for kind, record in records).encode()
        directories = [*directories_to_sync(self._path)] if self._start is None else []
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            if self._start is None:
                if has_partial_line(self._path):  # of a run that was killed
                    file.write(b"\n")
                self._start = file.tell()
            file.write(text)
        for directory in directories:
            sync(directory)
        self._digest.update(text)
        self._length += len(text)

    def state_dict(self) -> StateDict:
        """Flush the file to the disk, and return the position and the hash of the run's lines."""
        if self._start is not None:
            sync(self._path)
        return {"start": self._start, "length": self._length, "sha256": self._digest.hexdigest()}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Continue after the lines of a state, and remove the lines after them.

        Raises:
            DamagedCheckpointError: The file is missing, or these lines have changed.
        """
        self._start, self._length = state_dict["start"], state_dict["length"]
        if self._start is None:
            return
        try:
            with self._path.open("r+b") as file:
                file.seek(self._start)
                self._digest = hashlib.sha256(file.read(self._length))
                if self._digest.hexdigest() != state_dict["sha256"]:
                    raise DamagedCheckpointError(
                        f"{self._path} is not the history that was saved: its {self._length} bytes from {self._start} "
                        "on differ. Put it back, or waive it: resume_ignore={'history'} starts a new one."
                    )
                file.truncate(self._start + self._length)
        except FileNotFoundError:
            raise DamagedCheckpointError(
                f"{self._path} is missing, and the saved run has written {self._length} bytes to it. Put it back, or "
                "waive it: resume_ignore={'history'} starts a new one."
            ) from None


def to_json(record: Mapping[str, Any]) -> str:
    """Return a record as JSON. NaN is null and infinity 1e999, which readers of JSON take for infinity.

    Example:
        >>> to_json({"loss": math.nan, "grad_norm": -math.inf})
        '{"loss": null, "grad_norm": -1e999}'
    """
    try:
        return json.dumps(record, allow_nan=False)
    except ValueError:
        text = json.dumps(mark_non_finite(record))
        return text.replace(json.dumps(INFINITY), "1e999").replace(json.dumps(f"-{INFINITY}"), "-1e999")


def mark_non_finite(value: Any) -> Any:
    """Replace NaN by None, and infinities by a mark, in nested mappings of numbers."""
    if isinstance(value, Mapping):
        return {key: mark_non_finite(part) for key, part in value.items()}
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else INFINITY if value > 0 else f"-{INFINITY}"


def directories_to_sync(path: Path) -> Iterator[Path]:
    """Iterate over the directories that get a new entry when a file is created with its missing directories."""
    yield path.parent
    if not path.parent.exists():
        yield from directories_to_sync(path.parent)


def has_partial_line(path: Path) -> bool:
    """Return whether the last line of a file is incomplete."""
    with path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
        return file.read() not in (b"", b"\n")


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
