"""A journal: an append-only file of JSON lines, of which it is known how much a checkpoint has seen."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ptacc.errors import DamagedCheckpointError
from ptacc.types.protocols import StateDict


class HistoryFile:
    """A file that a run appends lines to; what others wrote before it stays.

    Its state is how much of the file is the run's, with a hash. A run that goes on checks that, and cuts off what was
    written after it.
    """

    def __init__(self, path: Path) -> None:
        """Append to `path`, which is made with its directory at the first line."""
        self._path = path
        self._start: int | None = None
        self._length = 0
        self._digest = hashlib.sha256()
        self._unsynced: list[Path] = []

    def append(self, records: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Append records, each with its kind."""
        text = "".join(json.dumps({"kind": kind, **record}) + "\n" for kind, record in records).encode()
        if self._start is None:
            self._unsynced = [*directories_to_sync(self._path)]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            if self._start is None:
                if is_within_a_line(self._path):  # a run was killed there
                    file.write(b"\n")
                self._start = file.tell()
            file.write(text)
        self._digest.update(text)
        self._length += len(text)

    def state_dict(self) -> StateDict:
        """Return where the run's lines are in the file and what they hash to, once they are on the disk."""
        if self._start is not None:
            for path in (self._path, *self._unsynced):
                sync(path)
            self._unsynced = []
        return {"start": self._start, "length": self._length, "sha256": self._digest.hexdigest()}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Go on after the lines of a state, and cut off what comes after them.

        Raises:
            DamagedCheckpointError: The file is gone, or these lines are not what was written.
        """
        self._start, self._length = state_dict["start"], state_dict["length"]
        if self._start is None:
            return
        try:
            with self._path.open("r+b") as file:
                file.seek(self._start)
                lines = file.read(self._length)
                self._digest = hashlib.sha256(lines)
                if self._digest.hexdigest() != state_dict["sha256"]:
                    raise DamagedCheckpointError(
                        f"{self._path} is not the history that was saved: its {self._length} bytes from {self._start} "
                        "on differ. Put it back, or waive it: resume_ignore={'history'} starts a new one."
                    )
                file.truncate(self._start + self._length)
        except FileNotFoundError:
            raise DamagedCheckpointError(
                f"{self._path} is gone, and the run that goes on has written {self._length} bytes to it. Put it back, "
                "or waive it: resume_ignore={'history'} starts a new one."
            ) from None


def directories_to_sync(path: Path) -> Iterator[Path]:
    """Iterate over the directories in which there is a new name once a file and its directories are made."""
    yield path.parent
    if not path.parent.exists():
        yield from directories_to_sync(path.parent)


def is_within_a_line(path: Path) -> bool:
    """Say whether the last line of a file has no end."""
    with path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
        return file.read() not in (b"", b"\n")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
