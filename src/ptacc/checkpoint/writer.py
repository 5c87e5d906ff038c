"""Saving: how several processes make one checkpoint, beside the steps if need be.

```
loop      rank 0 begins a draft and tells the others; each process encodes its parts, and copies them
writers   each writes and syncs its files, and leaves word of them in the draft; rank 0 awaits the words, and commits
loop      all hear of the outcome: the checkpoint, or one error
```

Writers make no collective: the loop's own may be under way. That a disk is too full even for a word, the loop tells.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from ptacc.checkpoint.parts import EncodedParts, write_encoded
from ptacc.checkpoint.storage.filesystem import Written, read_at_most, write_whole
from ptacc.checkpoint.storage.manifest import Manifest
from ptacc.checkpoint.storage.store import CheckpointStore, PendingCheckpoint
from ptacc.distributed.failure import Failure
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import CheckpointError
from ptacc.model.state_dict import first_non_finite

WORD = ".word-{rank}.json"
WORDS_WITHIN_SECONDS = 1800.0
"""How long rank 0 waits for the other processes' files."""
LOOK_EVERY = 0.5
"""Seconds to wait for them before it is looked whether those processes can still write."""
LARGEST_WORD = 1 << 24


class FailedElsewhereError(CheckpointError):
    """Another process failed; the message is its own."""


class NonFiniteWeightsError(CheckpointError):
    """Nothing failed: the weights hold NaN or infinity, and are not to be saved so."""


@dataclass(frozen=True)
class Writer:
    """One process's part in making a checkpoint.

    Args:
        store: Where it goes.
        draft: What rank 0 began.
        manifest: What it is, but for its files.
        files: The parts that this process writes, by the names of their files.
        distributed: The processes.
        weights: What this process holds of the weights, by name, where only numbers are to be saved.
        lost: Has the reason, once it is known that another process's files will not come.
    """

    store: CheckpointStore
    draft: PendingCheckpoint
    manifest: Manifest
    files: Mapping[str, EncodedParts]
    distributed: DistributedRuntime
    weights: Sequence[tuple[str, Tensor]] = ()
    lost: Future[str] = field(default_factory=Future)

    def write(self) -> Manifest | None:
        """Write this process's files; on rank 0, make a checkpoint of all processes' and return what it is.

        Raises:
            NonFiniteWeightsError: The weights are no numbers, here or elsewhere; nothing of it is left then.
            CheckpointError: Something could not be written, here or elsewhere; nor is anything left then.
        """
        try:
            self._check_fit()
            written: dict[str, Written] = {}
            for name, parts in self.files.items():
                written |= write_encoded(self.store, self.draft, name, parts)
            if self.distributed.rank:
                self._leave_word({"files": {name: asdict(file) for name, file in written.items()}})
                return None
            for rank in range(1, self.distributed.world_size):
                written |= self._await_word(rank)
            return self.store.commit(self.draft, replace(self.manifest, files=written))
        except NonFiniteWeightsError as error:
            self._end_by(error)
            raise
        except FailedElsewhereError as error:
            self._end_by(error)
            raise CheckpointError(str(error)) from error
        except Exception as error:  # whatever it is, rank 0 waits to be told
            what = str(error) if isinstance(error, OSError | CheckpointError) else f"{type(error).__name__}: {error}"
            failure = CheckpointError(f"{self.draft.name} was not saved: rank {self.distributed.rank}: {what}")
            self._end_by(failure)
            raise failure from error

    def _check_fit(self) -> None:
        if odd := first_non_finite(self.weights):
            raise NonFiniteWeightsError(
                f"The run was not saved after step {self.manifest.step}: {odd} holds NaN or infinity."
            )

    def _end_by(self, error: CheckpointError) -> None:
        """Clear up, and tell rank 0."""
        with contextlib.suppress(OSError):
            if self.distributed.rank:
                self._leave_word({"error": str(error), "is_unfit": isinstance(error, NonFiniteWeightsError)})
            else:
                self.store.discard(self.draft)

    def _leave_word(self, word: Mapping[str, object]) -> None:
        """Leave word for rank 0, whole or not at all."""
        path = self.draft.path / WORD.format(rank=self.distributed.rank)
        write_whole(self.store.disk, path, [json.dumps(word).encode()])

    def _await_word(self, rank: int) -> dict[str, Written]:
        """Wait until another process has written its files, and take its word away."""
        path = self.draft.path / WORD.format(rank=rank)
        start = time.monotonic()
        deadline, look = start + WORDS_WITHIN_SECONDS, start + LOOK_EVERY
        failure: Failure | None = None
        while not path.exists():
            if self.lost.done():
                raise FailedElsewhereError(self.lost.result())
            if failure is not None or time.monotonic() > deadline:
                because = "." if failure is None else f": {failure}"
                raise CheckpointError(f"rank {rank} has not written its files{because}")
            if time.monotonic() > look:
                failure, look = self.distributed.find_failure(), time.monotonic() + LOOK_EVERY
            # Where the directory is not on this machine, each look at it is a request.
            time.sleep(min(LOOK_EVERY, 0.002 + (time.monotonic() - start) / 20))
        word = json.loads(read_at_most(self.store.disk, path, LARGEST_WORD))
        if "error" in word:
            raise (NonFiniteWeightsError if word["is_unfit"] else FailedElsewhereError)(word["error"])
        self.store.disk.remove_file(path)
        return {name: Written(**file) for name, file in word["files"].items()}


class Save:
    """A writer at work: at once, or in a thread of its own where something else goes on meanwhile.

    That is the steps; and with several processes what the loop has to tell a writer that waits for the others.
    """

    def __init__(self, writer: Writer, after: Callable[[str], None], *, in_background: bool) -> None:
        """Set `writer` to work, and on rank 0 call `after` with the name of the checkpoint that was made."""
        self.writer, self._after = writer, after
        self.manifest: Manifest | None = None
        self.error: CheckpointError | None = None
        self._thread = threading.Thread(target=self._work, name=f"saving {writer.draft.name}")
        if in_background or not writer.distributed.is_single_process:
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

    def join(self, seconds: float | None = None) -> bool:
        """Wait for the end, or for so long, and say whether it came."""
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def give_up(self, reason: str) -> None:
        """Wait no longer for the files of other processes: they will not come."""
        self.writer.lost.set_result(reason)


class HostCopies:
    """Copies of tensors on the host, kept to be written over by the next ones: fresh memory costs more than a copy."""

    def __init__(self) -> None:
        """Start with none."""
        self._kept: dict[str, Tensor] = {}
        self._latest: dict[tuple[object, ...], Tensor] = {}

    def of(self, files: Mapping[str, EncodedParts]) -> dict[str, EncodedParts]:
        """Copy the tensors of each file, those of the time before being no longer needed."""
        self._latest = {}
        copies = {
            name: replace(parts, tensors={key: self._copy(f"{name}/{key}", t) for key, t in parts.tensors.items()})
            for name, parts in files.items()
        }
        if any(tensor.is_cuda for parts in files.values() for tensor in parts.tensors.values()):
            torch.cuda.synchronize()
        return copies

    def copy_of(self, tensor: Tensor) -> Tensor:
        """Return the copy that was made of a tensor, or a new one of a tensor that was in no file."""
        copy = self._latest.get(_location_key(tensor))
        return tensor.detach().clone() if copy is None else copy

    def _copy(self, key: str, tensor: Tensor) -> Tensor:
        kept = self._kept.get(key)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._kept[key] = kept
        self._latest[_location_key(tensor)] = kept
        return kept.copy_(tensor, non_blocking=True)


def _location_key(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.device
