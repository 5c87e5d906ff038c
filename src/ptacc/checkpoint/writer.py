"""Writing one checkpoint with several processes, in the background if asked for.

```
training loops    rank 0 begins a checkpoint and broadcasts it; each rank encodes and copies its parts
writers           each rank writes and syncs its files, then a note for rank 0; rank 0 waits for the notes and commits
training loops    rank 0 broadcasts the outcome: the checkpoint, or one error
```

Writers communicate through files only, since the training loops may be in a collective at the same time. If a disk is
too full even for a note, the training loops report it.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from ptacc.checkpoint.parts import write_parts
from ptacc.distributed.failure import Failure
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import CheckpointError
from ptacc.files.filesystem import FileDigest
from ptacc.serialization.json_codec import Encoded
from ptacc.storage.lock import DirectoryLock
from ptacc.storage.manifest import MAX_MANIFEST_SIZE, Manifest
from ptacc.storage.store import CheckpointStore, PendingCheckpoint

TIMEOUT_SECONDS = 1800.0
"""How long rank 0 waits for the files of another rank."""
POLL_SECONDS = 0.5
"""How often rank 0 checks whether another rank has failed, and how often at least it checks for a note."""


class FailedElsewhereError(CheckpointError):
    """Another rank failed; the message is from that rank."""


@dataclass
class Save:
    """One rank's work on a checkpoint, in a thread.

    Args:
        manifest: Describes the checkpoint, except for its files.
        files: The parts that this rank writes, by the names of their files.
        lock: The lock that rank 0 must still hold when the checkpoint is committed.
        on_commit: Called on rank 0 with the name of the new checkpoint, if given.
        cancelled: Why the files of other ranks will not come; empty as long as they may.
    """

    store: CheckpointStore
    pending: PendingCheckpoint
    manifest: Manifest
    files: Mapping[str, Encoded]
    distributed: DistributedRuntime
    lock: DirectoryLock
    on_commit: Callable[[str], None] | None
    error: CheckpointError | None = None
    cancelled: str = ""
    _thread: threading.Thread = field(init=False)

    def start(self) -> None:
        """Start the thread. It runs even if the training loop waits, since the loops of all ranks exchange errors."""
        self._thread = threading.Thread(target=self._run, name=f"saving {self.pending.name}")
        self._thread.start()

    def join(self, seconds: float | None = None) -> bool:
        """Wait until the work has ended, or for some seconds. Return whether it has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._write()
        except FailedElsewhereError as error:
            self._fail(CheckpointError(str(error)))
        except Exception as error:  # noqa: BLE001  # rank 0 waits for a note, whatever the error is
            what = str(error) if isinstance(error, OSError | CheckpointError) else f"{type(error).__name__}: {error}"
            failure = CheckpointError(f"{self.pending.name} was not saved: rank {self.distributed.rank}: {what}")
            failure.__cause__ = error
            self._fail(failure)
        else:
            if self.distributed.rank == 0 and self.on_commit is not None:
                self.on_commit(self.pending.name)

    def _write(self) -> None:
        written: dict[str, FileDigest] = {}
        for file, parts in self.files.items():
            written |= write_parts(self.store, self.pending, file, parts)
        if self.distributed.rank:
            self._signal_done(files={name: asdict(digest) for name, digest in written.items()})
            return
        for rank in range(1, self.distributed.world_size):
            written |= self._wait_for(rank)
        self.lock.check()
        self.store.commit(self.pending, replace(self.manifest, files=written))

    def _fail(self, error: CheckpointError) -> None:
        with contextlib.suppress(OSError):
            if self.distributed.rank:
                self._signal_done(error=str(error))
            else:
                self.store.discard(self.pending)
        self.error = error  # last, since the training loop raises it at once

    def _signal_done(self, **note: object) -> None:
        self.store.filesystem.replace_file(self._locate_note(self.distributed.rank), [json.dumps(note).encode()])

    def _wait_for(self, rank: int) -> dict[str, FileDigest]:
        """Wait until another rank has written its files, and return their digests."""
        path, filesystem = self._locate_note(rank), self.store.filesystem
        start = last_check = time.monotonic()
        failure: Failure | None = None
        while not filesystem.exists(path):
            now = time.monotonic()
            if self.cancelled:
                raise FailedElsewhereError(self.cancelled)
            if failure is not None or now > start + TIMEOUT_SECONDS:
                raise CheckpointError(f"rank {rank} has not written its files: {failure or 'no answer'}")
            if now > last_check + POLL_SECONDS:
                # The loop checks for the note once more, since the rank may have failed after it wrote its note.
                failure, last_check = self.distributed.find_failure(), now
            time.sleep(min(POLL_SECONDS, 0.002 + (now - start) / 20))  # a check may be a request to another host
        note = json.loads(filesystem.read_at_most(path, MAX_MANIFEST_SIZE))
        if "error" in note:
            raise FailedElsewhereError(note["error"])
        filesystem.remove_file(path)
        return {name: FileDigest(**digest) for name, digest in note["files"].items()}

    def _locate_note(self, rank: int) -> str:
        return f"{self.pending.path}/.done-{rank}.json"


def copy_to_host(parts: Encoded, buffers: dict[str, Tensor]) -> Encoded:
    """Copy the tensors of parts into the buffers of earlier copies: to allocate memory takes longer than to copy."""
    copies: dict[str, Tensor] = {}
    for key, tensor in parts.tensors.items():
        buffer = buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
        copies[key] = buffers[key] = buffer.copy_(tensor, non_blocking=True)
    if any(tensor.device.type != "cpu" for tensor in parts.tensors.values()):
        torch.accelerator.synchronize()
    return replace(parts, tensors=copies)
