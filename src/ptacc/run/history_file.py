"""An append-only file of JSON lines of one run, whose verified length is part of a checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ptacc.errors import DamagedCheckpointError, OptionError
from ptacc.files.filesystem import FileSystem
from ptacc.types.protocols import StateDict

INFINITY = "\0infinity"
"""Marks an infinity in text that becomes JSON."""
HEADER = b'{"kind": "run"'
"""How the first line of a history begins."""
ATTEMPTS = (b'{"kind": "resumed"', b'{"kind": "end"')
"""How the lines begin that say when the run was resumed, and how it ended before that."""


class HistoryFile:
    """A file to which one run appends lines.

    Its state is the length of the run's lines with their hash. A resumed run verifies the hash. When it first appends,
    it removes the lines that were written after the checkpoint: a run that is refused changes nothing. It keeps the
    lines about earlier attempts, so that the number of resumptions is known.

    Args:
        path: The file, which is created with its directory at the first line.
        checkpoints: The directory of the run's checkpoints, which identifies the run; None without checkpoints.
        may_start_over: Whether a new run replaces what an earlier one with this directory, which left no checkpoint,
            has written.
    """

    def __init__(self, path: Path, checkpoints: str | None = None, *, may_start_over: bool = False) -> None:
        if checkpoints is not None and "://" not in checkpoints:
            checkpoints = os.path.relpath(checkpoints, path.parent)  # both can be moved together
        self.checkpoints = checkpoints
        self._may_start_over = may_start_over
        self._path = path
        self._length = 0
        self._digest = hashlib.sha256()

    def check_unused(self) -> None:
        """Raise `OptionError` if the file belongs to another run."""
        content = self._path.read_bytes() if self._path.exists() else b""
        header, newline, _ = content.partition(b"\n")
        if not newline:  # a loss of power may leave a part of the first line
            is_own = HEADER.startswith(header.rstrip(b"\0")[: len(HEADER)])
        else:
            is_own = self._may_start_over and header.startswith(HEADER)
            is_own = is_own and json.loads(header).get("checkpoints") == self.checkpoints
        if not is_own:
            raise OptionError(
                f"history_file={str(self._path)!r} belongs to another run: it has {len(content)} bytes. Give this "
                "run a file of its own, or move that file away."
            )

    def append(self, records: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Append records, each with its kind."""
        text = "".join(to_json({"kind": kind, **record}) + "\n" for kind, record in records).encode()
        if not text:
            return
        if self._length:
            with self._path.open("a+b") as file:
                if file.tell() > self._length:
                    text = self._cut(file) + text
                file.write(text)
        else:
            self._create(text)
        self._digest.update(text)
        self._length += len(text)

    def _cut(self, file: BinaryIO) -> bytes:
        """Remove the lines after the run's own, and return those about its attempts."""
        file.seek(self._length)
        later = b"".join(line for line in file if line.startswith(ATTEMPTS) and line.endswith(b"\n"))
        file.truncate(self._length)
        return later

    def _create(self, text: bytes) -> None:
        self.check_unused()
        directories = [*directories_to_sync(self._path)]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("wb") as file:
            file.write(text)
        for directory in directories:  # `state_dict` syncs the content
            FileSystem().sync_directory(str(directory))

    def state_dict(self) -> StateDict:
        """Flush the file to the disk, and return the length and the hash of the run's lines."""
        if self._length:
            with self._path.open("rb") as file:
                os.fsync(file.fileno())
        return {"length": self._length, "sha256": self._digest.hexdigest()}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Continue after the lines of a state.

        Raises:
            DamagedCheckpointError: The file is missing, or these lines have changed.
        """
        self._length = state_dict["length"]
        if not self._length:
            return
        try:
            with self._path.open("rb") as file:
                self._digest = hashlib.sha256(file.read(self._length))
        except FileNotFoundError:
            raise DamagedCheckpointError(
                f"{self._path} is missing, and the saved run has written {self._length} bytes to it. Put it back, or "
                "pass resume_ignore={'history'} to start a new one."
            ) from None
        if self._digest.hexdigest() != state_dict["sha256"]:
            raise DamagedCheckpointError(
                f"{self._path} is not the history that was saved: its first {self._length} bytes differ. Put it back. "
                "To start a new one, move it away and pass resume_ignore={'history'}."
            )


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
