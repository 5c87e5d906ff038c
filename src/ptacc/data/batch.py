"""Data: what users hand over, checked, and what each process gets of it.

```
dataset -> make_..._dataloader() -> DataLoader -> make_source() -> BatchSource -> HostBatch, HostBatch, ...
```
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol

from ptacc.types.aliases import BatchT
from ptacc.types.protocols import StateDict


@dataclass(frozen=True, slots=True)
class HostBatch(Generic[BatchT]):
    """One batch as it came from the loader, still on the host.

    Args:
        data: The batch.
        indices: The dataset's indices of its samples, where there are any.
        samples: Samples in it that count; None where nobody counted them.
        total: Samples that count in all processes' batches together; None where nobody counted them.
        is_padding: Whether it only keeps this process in step with the others, and counts nowhere.
        end: Where the processes are in the epoch's data once they are through with it, each with its own.
    """

    data: BatchT
    indices: Sequence[int] | None
    samples: int | None
    total: int | None
    is_padding: bool
    end: int


class BatchSource(Protocol):
    """The batches of this process, epoch by epoch; every process gets equally many, some of them phantoms.

    Where the processes are in an epoch's data is told by one number, the same on all of them: samples that they took
    together, or batches of a loader, or of a stream.
    """

    def num_batches(self, start: int = 0) -> int | None:
        """Return the batches of an epoch from `start` on, None where the data has no length."""
        ...

    def place_after(self, batches: int) -> int:
        """Return the place in an epoch's data after so many batches of each process."""
        ...

    @property
    def partition_scheme(self) -> PartitionScheme:
        """How the data is dealt, on which it depends what comes after a place in it."""
        ...

    def fingerprint(self) -> str:
        """Tell of the data what has to be the same on all processes; nothing where each has its own."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[HostBatch[Any]]:
        """Iterate over the batches of one epoch, counted from 0, from `start` on: the `end` of an earlier batch.

        What comes is what would have come without a break: the same samples, loaded with the same randomness. A
        dataset with indices is not asked for what comes before; a stream is read from its beginning.
        """
        ...

    def state_dict(self) -> StateDict:
        """Return the state, at the beginning of the present epoch, of what has an order of its own to go on with."""
        ...

    def load_state_dict(self, state_dict: StateDict, /) -> None:
        """Go on from a state."""
        ...


@dataclass(frozen=True, slots=True)
class PartitionScheme:
    """How data is dealt.

    Args:
        of: What is dealt, in words.
        how: How, in words: whoever deals the same in the same way deals the same batches from the same place.
        goes_on_anew: Whether an epoch may go on from a place in it after the way has changed.
    """

    of: str
    how: str
    goes_on_anew: bool
