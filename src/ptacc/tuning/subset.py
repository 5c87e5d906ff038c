"""The first samples of a user's data, for searches and assertions to train on."""

from __future__ import annotations

from typing import Generic

from torch.utils.data import DataLoader, IterableDataset

from ptacc.data.dataloader_config import check_dataset
from ptacc.errors import DataError
from ptacc.types.aliases import T_co
from ptacc.types.protocols import SizedDataset


class Subset(Generic[T_co]):
    """The first `samples` samples of a dataset, repeated in order up to a length of `length`."""

    def __init__(self, data: SizedDataset[T_co], samples: int, length: int) -> None:
        self._data, self._samples, self._length = data, samples, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int, /) -> T_co:
        return self._data[index % self._samples]


def check_map_style(function: str, argument: str, data: object) -> None:
    """Raise `DataError` for data without a length and an index: a stream, or a ready loader."""
    if isinstance(data, DataLoader | IterableDataset):
        raise DataError(
            f"{function}({argument}={type(data).__name__}(...)): makes its own batches of some of the samples, so it "
            "needs a dataset with a length and an index. Give `list(itertools.islice(stream, 100))`, or the loader's "
            "dataset and collate_fn."
        )
    check_dataset(data)
