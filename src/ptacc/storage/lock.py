"""The lock of a directory, so that one run at a time writes to it.

On a disk, the system holds the lock for a process, on whatever host or in whatever container that is, and releases it
when the process ends. Where the file system has no locks, as in an object store, the run that starts last takes the
directory over, and the run before it is refused its next checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import secrets
import socket
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from ptacc.errors import CheckpointError, DamagedCheckpointError
from ptacc.files.filesystem import FileSystem, as_checkpoint_error
from ptacc.files.paths import is_url, resolve_links
from ptacc.storage.store import CheckpointStore

LOCK = ".lock"
WAIT_SECONDS = 10.0
"""How long to wait for a process that is ending, as when a run is killed and started again at once."""
MAX_SIZE = 1 << 12


def describe_process() -> bytes:
    """Return a description of this process, for others to read, which no other lock has."""
    started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return f"process {os.getpid()} on {socket.gethostname()}, since {started} ({secrets.token_hex(8)})".encode()


@dataclass
class DirectoryLock:
    """The lock of a store's directory.

    Args:
        store: The store.
        owner: The content of the lock's file.
    """

    store: CheckpointStore
    owner: bytes = field(default_factory=describe_process)
    _file: FileIO | None = None
    _is_held: bool = False  # not in a run of a search, which saves elsewhere or not at all

    @property
    def path(self) -> str:
        """The path of the lock's file."""
        return posixpath.join(resolve_links(self.store.directory), LOCK)

    @contextlib.contextmanager
    def held(self) -> Generator[None]:
        """Hold the lock for the block.

        Raises:
            CheckpointError: Another process holds it, after `WAIT_SECONDS`, or the directory cannot be written to.
        """
        deadline = time.monotonic() + WAIT_SECONDS
        with as_checkpoint_error(self.store.directory):
            self.store.prepare()
            while not self._acquire():
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"{self.store.directory} is in use by another run: {self._describe_owner()}. End that run, or "
                        "give this one a directory of its own."
                    )
                time.sleep(0.1)
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
            self._release()

    def check(self) -> None:
        """Raise `CheckpointError` if another run has taken the directory over while the lock is held here."""
        if self._is_held and self.read() != self.owner:
            raise CheckpointError(
                f"{self.store.directory} was taken over by another run: {self._describe_owner()}. This run cannot save "
                "there any more."
            )

    def _acquire(self) -> bool:
        if is_url(self.path):
            self.store.filesystem.replace_file(self.path, [self.owner])
            return True
        import fcntl

        # A lock of `lockf` is not inherited by forked processes, such as DataLoader workers, which may live longer.
        file = FileIO(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.close()
                return False
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        if not self._is_current(file):  # its owner has removed it in between
            file.close()
            return False
        file.truncate(0)
        file.write(self.owner)
        os.fsync(file.fileno())  # so that other hosts see it
        self._file = file
        return True

    def _release(self) -> None:
        with contextlib.suppress(OSError, CheckpointError):
            if self.read() == self.owner:
                filesystem = FileSystem() if self._file else self.store.filesystem
                filesystem.remove_file(self.path)
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self) -> bytes | None:
        """Return the content of the lock's file, None if it is missing."""
        if self._file is not None and self._is_current(self._file):
            return os.pread(self._file.fileno(), MAX_SIZE, 0)  # to open and close it again would release the lock
        with contextlib.suppress(DamagedCheckpointError):
            return self.store.filesystem.read_at_most(self.path, MAX_SIZE)
        return None

    def _is_current(self, file: FileIO) -> bool:
        """Return whether an open file is still the one at the path."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(file.fileno()), Path(self.path).lstat())
        return False

    def _describe_owner(self) -> str:
        """Return the start of the content of the lock's file in printable characters."""
        text = (self.read() or b"unknown").decode(errors="replace").partition(" (")[0]
        return ascii(text[:200])[1:-1]
