"""What is asked of a DataLoader that the trainer builds."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ptacc.errors import DataError, OptionError
from ptacc.types.arguments import DataLoaderKwargs
from ptacc.validation import check_at_least, check_keywords

DEFAULT_BATCH_SIZE = 8
HOST = torch.device("cpu")
LIMIT_VARIABLE = "PTACC_LIMIT_BATCHES"


@dataclass(frozen=True, slots=True)
class DataLoaderConfig:
    """What `make_train_dataloader` and `make_eval_dataloader` are asked for.

    Args:
        dataset: The user's dataset.
        per_device_batch_size: Samples of a batch of one process; None where nothing was said.
        collate_fn: The user's collate function, None for torch's own.
        kwargs: Further keywords for the DataLoader.
        device: Where the batches will go, the host if not given.
    """

    dataset: Dataset[object]
    per_device_batch_size: int | None
    collate_fn: Callable[[list[Any]], object] | None
    kwargs: DataLoaderKwargs
    device: torch.device = HOST

    def build(self, *, shuffle: bool) -> DataLoader[object]:
        """Make the DataLoader that was asked for. For a GPU it pins its batches, unless the user said otherwise.

        Args:
            shuffle: Whether samples are shuffled where the user said nothing of their order.

        Raises:
            DataError: The dataset is empty or none at all.
            OptionError: A count below 1, or a batch size beside a batch sampler.
        """
        check_dataset(self.dataset)
        advice = "The batch size is per_device_batch_size, and collate_fn an argument of its own."
        check_keywords("The DataLoader", self.kwargs, DataLoaderKwargs.__annotations__, advice)
        kwargs: dict[str, Any] = dict(self.kwargs)
        kwargs.setdefault("generator", torch.Generator())  # or iterators would draw from the global one
        kwargs.setdefault("pin_memory", self.device.type == "cuda")
        if "batch_sampler" in kwargs:
            if self.per_device_batch_size is not None:
                raise OptionError(
                    f"per_device_batch_size={self.per_device_batch_size} beside a batch_sampler: the batch sampler "
                    "decides how many samples a batch has. Leave out one of them."
                )
            return DataLoader(self.dataset, collate_fn=self.collate_fn, **kwargs)
        size = DEFAULT_BATCH_SIZE if self.per_device_batch_size is None else self.per_device_batch_size
        check_at_least("train", "per_device_batch_size", size, 1)
        if not isinstance(self.dataset, IterableDataset) and "sampler" not in kwargs:
            kwargs.setdefault("shuffle", shuffle)
        return DataLoader(self.dataset, batch_size=size, collate_fn=self.collate_fn, **kwargs)


def check_dataset(dataset: object) -> None:
    """Raise `DataError` for no data, an empty dataset, or one that is not a dataset at all."""
    if dataset is None:
        raise DataError("No data was given: got None. Pass a dataset or a DataLoader.")
    if isinstance(dataset, IterableDataset | DataLoader):
        return
    if isinstance(dataset, Mapping):
        raise DataError("Got a mapping, and one dataset is needed here. Several sets by name are for evaluation.")
    if not (isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")):
        raise DataError(
            f"{type(dataset).__name__} is no dataset: it needs __len__ and __getitem__, or to be an IterableDataset."
        )
    if len(dataset) == 0:
        raise DataError(f"{type(dataset).__name__} is empty: its length is 0. Pass a dataset with samples in it.")


def limit_from_environment(limit: int | None) -> int | None:
    """Return the limit of batches for a smoke run: as given, or from `PTACC_LIMIT_BATCHES`."""
    text = os.environ.get(LIMIT_VARIABLE)
    if limit is None and text:
        if not text.isdigit():
            raise OptionError(f"{LIMIT_VARIABLE}={text!r}: must be a whole number of batches.")
        limit = int(text)
    if limit is not None:
        check_at_least("train", "limit_batches", limit, 1)
    return limit
