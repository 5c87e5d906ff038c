"""A few samples of a user's data, for assertions to train on."""

from __future__ import annotations

from typing import Generic

from torch.utils.data import DataLoader, IterableDataset

from ptacc.data.dataloader_config import check_dataset
from ptacc.errors import DataError
from ptacc.types.aliases import T_co
from ptacc.types.protocols import SizedDataset


class Subset(Generic[T_co]):
    """The first samples of a dataset, over and over.

    Args:
        data: The dataset.
        samples: How many of it are taken.
        length: How many there are in all, from the first one again after the last.
    """

    def __init__(self, data: SizedDataset[T_co], samples: int, length: int) -> None:
        """Take samples of `data`."""
        self._data, self._samples, self._length = data, samples, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int, /) -> T_co:
        return self._data[index % self._samples]


def check_map_style(assertion: str, data: object) -> None:
    """Raise `DataError` for data whose samples cannot be asked for one by one."""
    if isinstance(data, DataLoader | IterableDataset):
        raise DataError(
            f"{assertion}(data={type(data).__name__}(...)): takes some samples and batches them in its own way, so it "
            "needs a dataset with a length and an index. Give `list(itertools.islice(stream, 100))`, or the loader's "
            "dataset and collate_fn."
        )
    check_dataset(data)
