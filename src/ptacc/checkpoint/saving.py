"""Saving: how several processes make one checkpoint, beside the steps if need be.

```
loop      rank 0 begins a draft and tells the others; each process encodes its parts, and copies them
writers   each writes and syncs its files, and leaves word of them in the draft; rank 0 awaits the words, and commits
loop      all hear of the outcome: the checkpoint, or one error
```

Writers make no collective: the loop's own may be under way.
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

from ptacc.checkpoint.disk import Written, read_file, write_file
from ptacc.checkpoint.manifest import Manifest
from ptacc.checkpoint.snapshot import EncodedParts, write_encoded
from ptacc.checkpoint.store import CheckpointStore, Draft
from ptacc.errors import CheckpointError

WORD = ".word-{rank}.json"
WORDS_WITHIN_SECONDS = 1800.0
"""How long rank 0 waits for the other processes' files."""
LARGEST_WORD = 1 << 24


@dataclass(frozen=True)
class Writer:
    """One process's part in making a checkpoint.

    Args:
        store: Where it goes.
        draft: What rank 0 began.
        manifest: What it is, but for its files.
        files: The parts that this process writes, by the names of their files.
        rank: Index of this process.
        world_size: Number of processes.
        gave_up: Set when nobody waits for the checkpoint any more.
    """

    store: CheckpointStore
    draft: Draft
    manifest: Manifest
    files: Mapping[str, EncodedParts]
    rank: int
    world_size: int
    gave_up: threading.Event = field(default_factory=threading.Event)

    def write(self) -> Manifest | None:
        """Write this process's files; on rank 0, make a checkpoint of all processes' and return what it is.

        Raises:
            CheckpointError: Something could not be written, here or elsewhere; nothing of it is left then.
        """
        try:
            written: dict[str, Written] = {}
            for name, parts in self.files.items():
                written |= write_encoded(self.store, self.draft, name, parts)
            if self.rank:
                self._leave_word({"files": {name: asdict(file) for name, file in written.items()}})
                return None
            for rank in range(1, self.world_size):
                written |= self._await_word(rank)
            return self.store.commit(self.draft, replace(self.manifest, files=written))
        except (OSError, CheckpointError) as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> CheckpointError:
        """Clear up, tell rank 0, and return the error that names the checkpoint and the process."""
        with contextlib.suppress(OSError):
            if self.rank:
                self._leave_word({"error": str(error)})
            else:
                self.store.discard(self.draft)
        return CheckpointError(f"{self.draft.name} was not saved: rank {self.rank}: {error}")

    def _leave_word(self, word: Mapping[str, object]) -> None:
        """Leave word for rank 0, whole or not at all."""
        target = self.draft.path / WORD.format(rank=self.rank)
        unfinished = target.with_suffix(".unfinished")
        write_file(self.store.disk, unfinished, [json.dumps(word).encode()])
        self.store.disk.rename(unfinished, target)

    def _await_word(self, rank: int) -> dict[str, Written]:
        """Wait until another process has written its files, and take its word away."""
        path = self.draft.path / WORD.format(rank=rank)
        deadline = time.monotonic() + WORDS_WITHIN_SECONDS
        while not path.exists():
            if self.gave_up.is_set() or time.monotonic() > deadline:
                raise CheckpointError(f"rank {rank} has not written its files.")
            time.sleep(0.002)
        word = json.loads(read_file(path, min(path.stat().st_size, LARGEST_WORD)))
        if "error" in word:
            raise CheckpointError(f"rank {rank}: {word['error']}")
        self.store.disk.remove_file(path)
        return {name: Written(**file) for name, file in word["files"].items()}


class Save:
    """A writer at work: at once, or in a thread of its own."""

    def __init__(self, writer: Writer, after: Callable[[str], None], *, in_background: bool) -> None:
        """Set `writer` to work, and on rank 0 call `after` with the name of the checkpoint that was made."""
        self.writer, self._after = writer, after
        self.manifest: Manifest | None = None
        self.error: CheckpointError | None = None
        self._thread = threading.Thread(target=self._work, name=f"saving {writer.draft.name}")
        if in_background:
            self._thread.start()
        else:
            self._work()

    def _work(self) -> None:
        try:
            self.manifest = self.writer.write()
            if self.manifest is not None:
                self._after(self.manifest.name)
        except CheckpointError as error:
            self.error = error
        except Exception as error:  # noqa: BLE001  # or it would be lost with the thread
            self.error = CheckpointError(f"{self.writer.draft.name} was not saved: {type(error).__name__}: {error}")
            self.error.__cause__ = error

    def join(self, seconds: float | None = None) -> None:
        """Wait for the end, after `seconds` no longer for other processes."""
        if self._thread.is_alive():
            self._thread.join(seconds)
            self.writer.gave_up.set()
            self._thread.join()


class HostCopies:
    """Copies of tensors on the host, kept to be written over by the next ones: fresh memory costs more than a copy."""

    def __init__(self) -> None:
        """Start with none."""
        self._kept: dict[str, Tensor] = {}

    def of(self, parts: EncodedParts, name: str) -> EncodedParts:
        """Copy the tensors in `parts`, those under `name` of the time before being no longer needed."""
        copies = {key: self._copy(f"{name}/{key}", tensor) for key, tensor in parts.tensors.items()}
        if any(tensor.is_cuda for tensor in parts.tensors.values()):
            torch.cuda.synchronize()
        return replace(parts, tensors=copies)

    def _copy(self, key: str, tensor: Tensor) -> Tensor:
        kept = self._kept.get(key)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._kept[key] = kept
        return kept.copy_(tensor, non_blocking=True)
