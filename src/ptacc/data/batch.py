"""The interface between data loading and the loop.

```
dataset -> make_..._dataloader() -> DataLoader -> make_source() -> BatchSource -> HostBatch, HostBatch, ...
```
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from ptacc.types.aliases import BatchT
from ptacc.types.protocols import StateDict


@dataclass(slots=True)
class HostBatch(Generic[BatchT]):
    """One batch of this rank, as loaded on the host.

    Args:
        data: The batch. None if the collate function returned None, which leaves it out.
        indices: Indices of its samples in the dataset, None if unknown.
        samples: Number of its samples, 0 for a padding batch, None if unknown.
        total: Number of samples in the batches of all ranks together, None if unknown.
        is_padding: Whether the batch only gives this rank as many batches as the others have. A padding batch is left
            out of losses, metrics and predictions.
        end: Offset in the epoch's data after this batch.
    """

    data: BatchT
    indices: Sequence[int] | None
    samples: int | None
    total: int | None
    is_padding: bool
    end: int


@dataclass(frozen=True, slots=True)
class PartitionScheme:
    """How a source splits its data into the batches of the ranks.

    Args:
        data: Describes the data, such as `"100 samples"`.
        batching: Describes how it is split. With the same data and batching, an offset is followed by the same batches.
        allows_rebatching: Whether an epoch may be resumed within it after the batching has changed.
        order: Describes the order of the data, such as `"shuffled"`.
    """

    data: str
    batching: str
    allows_rebatching: bool
    order: str = ""

    def invariants(self) -> dict[str, str]:
        """Return what must not change within an epoch when a run is resumed, by name."""
        return {"data": self.data, "batch_size": self.batching, "data_order": self.order}


class BatchSource(ABC):
    """The batches of this rank, epoch by epoch. Every rank gets the same number of batches, some of them padding.

    A position in an epoch's data is an offset, the same on all ranks: a number of samples over all ranks, or of batches
    of a loader or of a stream.
    """

    @abstractmethod
    def num_batches(self, start: int = 0) -> int | None:
        """Return the number of batches left in an epoch at offset `start`, None if the data has no length.

        It is known exactly for the epoch that `epoch` began last. Before the first one it is what the data promises.
        """

    @abstractmethod
    def offset_after(self, batches: int) -> int:
        """Return the offset after this many batches of each rank."""

    @property
    @abstractmethod
    def partition_scheme(self) -> PartitionScheme:
        """How the data is split into batches."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Describe what must be the same on all ranks. Empty if each rank has its own data."""

    def sync(self) -> None:
        """Exchange what this rank must know of the others' data. A collective, called before the source is used."""

    @abstractmethod
    def set_epoch(self, epoch: int) -> None:
        """Call `set_epoch` of training data in this process, which an evaluation may share. `epoch` does so, too."""

    @abstractmethod
    def epoch(self, epoch: int, start: int = 0) -> Iterator[HostBatch[Any]]:
        """Begin an epoch, at once, and return an iterator over its batches. A collective.

        Args:
            epoch: The epoch, counted from 0.
            start: Offset to resume at. The batches are those of an uninterrupted epoch: the same samples, loaded with
                the same random numbers. Earlier samples of a map-style dataset are not loaded; a stream is read from
                its beginning.
        """

    @abstractmethod
    def state_dict(self) -> StateDict:
        """Return the state of generators, samplers and streams, which determines the batches to come."""

    @abstractmethod
    def load_state_dict(self, state_dict: StateDict, /) -> None:
        """Restore a state, which takes effect when the next epoch begins."""

    def close(self) -> None:
        """Stop the workers that a loader made by the source keeps between epochs. They start again if needed."""
