"""Batches of an iterable dataset: every rank and every worker reads the same stream, and keeps its part."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader
from typing_extensions import override

from ptacc.data.batch import HostBatch, PartitionScheme
from ptacc.data.division import check_same_on_all_ranks
from ptacc.data.loading import get_loader_settings, has_default_collate, stop_workers, unwrap_batch
from ptacc.data.replay import ReplaySource
from ptacc.data.shared_stream import SharedStream, StreamReader
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import DataError
from ptacc.types.protocols import StateDict, Stateful

ANY = "any"
"""Stands for the digest of any batches."""


class IterableSource(ReplaySource):
    """An `IterableDataset`, of which each rank takes its part of every global batch. Offsets are numbers of batches.

    A dataset that is `Stateful` and read without workers resumes from its own state, if that leads to the batch that
    followed when the run was saved. In all other cases the stream is replayed.
    """

    def __init__(
        self, loader: DataLoader[Any], distributed: DistributedRuntime, seed: int, *, is_training: bool = True
    ) -> None:
        super().__init__(loader.dataset)
        self._distributed = distributed
        self._stream = SharedStream(loader, distributed, seed, is_training=is_training)
        self._loader = DataLoader(self._stream, batch_size=None, **get_loader_settings(loader))
        self._workers = max(loader.num_workers, 1)
        self._stateful = loader.dataset if isinstance(loader.dataset, Stateful) and not loader.num_workers else None
        self._num_read: int | None = None  # batches of the last epoch of a stream with a length
        self._reader: StreamReader | None = None
        self._beginning: StateDict = {}  # of the current epoch: the dataset's state, and the digest of the first batch
        self._keeps_samples = has_default_collate(loader)

    @override
    def num_batches(self, start: int = 0) -> int | None:
        """Return the number of batches left. Until an epoch was read, workers are taken to share it evenly."""
        total = self._stream.num_batches(self._workers) if self._num_read is None else self._num_read
        return None if total is None else max(total - start, 0)

    @override
    def offset_after(self, batches: int) -> int:
        return batches

    @property
    @override
    def partition_scheme(self) -> PartitionScheme:
        # What a stream draws at random while it is read depends on where its batches end.
        batching = f"global batches of {self._stream.size}, {self._workers} at a time"
        return PartitionScheme("a stream", batching, allows_rebatching=False)

    @override
    def fingerprint(self) -> str:
        return f"a stream in global batches of {self._stream.size}"

    @override
    def set_epoch(self, epoch: int) -> None:
        self._stream.set_epoch(epoch)

    @override
    def epoch(self, epoch: int, start: int = 0) -> Iterator[HostBatch[Any]]:
        self.set_epoch(epoch)
        saved = self._start_epoch(start)
        self._saved = saved  # until the dataset has been read, or for the next epoch
        if start and is_at_end(start, saved.get("stream")):
            return
        reader = self._reader = self._open(start, saved.get("stream"))
        self._saved = {}
        # Each of several workers may end in a short batch, and it is the dataset that splits itself over them.
        expected = self._stream.num_batches(1) if self._workers == 1 else None
        if self._distributed.rendezvous is not None:
            check_same_on_all_ranks(self._distributed, self._owner_name, reader.first_summary())
        for data, samples, total, _ in reader:
            end = reader.batches
            if expected is not None and end == expected and reader.peek():
                self._stream.check_length(end + 1, expected, "more")
            batch = unwrap_batch(data)
            self._check_replayed(batch, end)
            if end > start:
                known_total = total if self._keeps_samples else None
                yield HostBatch(batch, None, samples, known_total, is_padding=not samples, end=end)
        if expected is not None:
            self._stream.check_length(reader.batches, expected, str(reader.batches))
        if self._stream.num_batches(1) is not None:
            self._num_read = reader.batches

    def _open(self, start: int, saved: StateDict | None) -> StreamReader:
        """Start to read an epoch: at `start` if the dataset's saved state leads there, otherwise at the beginning.

        Raises:
            DataError: The batches are not those of the saved run, from wherever the dataset is read.
        """
        dataset: Any = self._stateful
        if dataset is None:
            return StreamReader(self._loader, self._stream)
        attributes, is_replayed = vars(dataset).copy(), False
        for state, batches, digest in starting_points(start, saved):
            self._stream.resume_from(batches, state)
            reader = StreamReader(self._loader, self._stream, batches, state)
            found = reader.state_dict()
            if digest in (None, found["next"]) or (digest == ANY and found["next"]):
                beginning = saved if batches and saved else {"start": found["place"], "first": found["next"]}
                self._beginning = {name: beginning[name] for name in ("start", "first")}
                if is_replayed:
                    warn_of_replay(dataset)
                return reader
            is_replayed |= batches > 0
            del reader  # its generator ends before the attributes are restored
            vars(dataset).clear()
            vars(dataset).update(attributes)
        raise DataError(
            f"{type(dataset).__name__} cannot be resumed within the epoch: neither with its saved state nor from its "
            "beginning does it give the batches that it gave before. Save in its state_dict() all that determines its "
            "order, or derive the order from the epoch, which `set_epoch` receives."
        )

    @override
    def state_dict(self) -> StateDict:
        state = super().state_dict()
        if self._stateful is None or self._saved:
            return state
        if self._reader is None:
            return state | {"stream": {"batches": 0, "start": copy.deepcopy(self._stateful.state_dict())}}
        return state | {"stream": self._beginning | self._reader.state_dict()}

    @override
    def close(self) -> None:
        stop_workers(self._loader)


def is_at_end(start: int, saved: StateDict | None) -> bool:
    """Return whether a stream was saved at the end of an epoch. Its state may then be that of the next epoch."""
    return saved is not None and saved["batches"] == start and "place" in saved and saved["next"] is None


def starting_points(start: int, saved: StateDict | None) -> Iterator[tuple[StateDict | None, int, str | None]]:
    """Yield what an epoch may be read from, best first.

    Each is a state to load, if any, the number of batches read in it, and the digest of the batch that must follow.
    """
    if saved is None:
        yield None, 0, None
    elif start == 0:
        if is_at_end(saved["batches"], saved):
            yield saved["place"], 0, ANY  # none follows if the dataset is only reset when it is read again
            yield None, 0, ANY  # none follows if the state is that of a stream within the dataset
            yield saved["start"], 0, None
        else:
            yield None, 0, None
    else:
        if saved["batches"] == start and "place" in saved:
            yield saved["place"], start, saved["next"]
        yield None, 0, saved["first"]
        yield saved["start"], 0, saved["first"]


def warn_of_replay(dataset: object) -> None:
    """Warn that a dataset's state is incomplete, which costs the time to read it again."""
    warnings.warn(
        f"{type(dataset).__name__}.load_state_dict() led to another batch than the one that followed when the run was "
        "saved. The stream is read again from its beginning up to that batch: this is right, but takes longer. Save in "
        "its state_dict() all that determines its order, such as the contents of a shuffle buffer.",
        stacklevel=2,
    )
