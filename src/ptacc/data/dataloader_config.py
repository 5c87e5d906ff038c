"""The configuration of a DataLoader that a trainer builds, and checks of the data it is given."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ptacc.data.loading import known_length
from ptacc.errors import DataError, OptionError
from ptacc.types.arguments import DataLoaderKwargs
from ptacc.validation import check_at_least, check_keywords

DEFAULT_BATCH_SIZE = 8
CPU = torch.device("cpu")
LIMIT_VARIABLE = "PTACC_LIMIT_BATCHES"


@dataclass(frozen=True, slots=True)
class DataLoaderConfig:
    """What `make_train_dataloader` and `make_eval_dataloader` build a DataLoader from.

    Args:
        dataset: The user's dataset.
        per_device_batch_size: Samples per batch and process, None if not given.
        collate_fn: The user's collate function, None for torch's default.
        kwargs: Further keywords for the DataLoader.
        device: The device that the batches will be copied to.
    """

    dataset: Dataset[object]
    per_device_batch_size: int | None
    collate_fn: Callable[[list[Any]], object] | None
    kwargs: DataLoaderKwargs
    device: torch.device = CPU

    def build(self, *, shuffle: bool) -> DataLoader[object]:
        """Build the DataLoader. It pins its batches if the device is a GPU, unless `kwargs` has `pin_memory`.

        Args:
            shuffle: Whether to shuffle, unless `kwargs` has `shuffle` or a sampler.

        Raises:
            DataError: The dataset is empty or not a dataset.
            OptionError: A batch size below 1, or given together with a batch sampler.
            TypeError: Unknown keywords.
        """
        check_dataset(self.dataset)
        advice = "The batch size is per_device_batch_size, and collate_fn an argument of its own."
        check_keywords("The DataLoader", self.kwargs, DataLoaderKwargs.__annotations__, advice)
        kwargs: dict[str, Any] = dict(self.kwargs)
        kwargs.setdefault("generator", torch.Generator())  # else iterators draw from the global one
        kwargs.setdefault("pin_memory", self.device.type == "cuda")
        if "batch_sampler" in kwargs:
            if self.per_device_batch_size is not None:
                raise OptionError(
                    f"per_device_batch_size={self.per_device_batch_size} with a batch_sampler: the batch sampler "
                    "decides how many samples a batch has. Leave out one of them."
                )
            return DataLoader(self.dataset, collate_fn=self.collate_fn, **kwargs)
        size = DEFAULT_BATCH_SIZE if self.per_device_batch_size is None else self.per_device_batch_size
        check_at_least("train", "per_device_batch_size", size, 1)
        if not isinstance(self.dataset, IterableDataset) and "sampler" not in kwargs:
            kwargs.setdefault("shuffle", shuffle)
        return DataLoader(self.dataset, batch_size=size, collate_fn=self.collate_fn, **kwargs)


def check_dataset(dataset: object) -> None:
    """Raise `DataError` for None, an empty dataset, a pair of arrays, or an object that is not a dataset."""
    if dataset is None:
        raise DataError("No data was given: got None. Pass a dataset or a DataLoader.")
    if isinstance(dataset, IterableDataset | DataLoader):
        return
    if isinstance(dataset, Mapping):
        raise DataError(f"Got a mapping ({type(dataset).__name__}), but one dataset is needed. {choose_one(dataset)}")
    if isinstance(getattr(dataset, "loader", None), DataLoader):
        raise DataError(
            f"{type(dataset).__name__} wraps a DataLoader. Pass the DataLoader itself: ptacc uses its dataset, order "
            "and collate function, and moves batches to the device. For timm: create_loader(..., use_prefetcher=False)."
        )
    length = known_length(dataset)
    if length is None or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"{type(dataset).__name__} is not a dataset: it needs __len__ and __getitem__, or to be an IterableDataset."
        )
    if length == 0:
        raise DataError(f"{type(dataset).__name__} is empty: its length is 0. Pass a dataset with samples in it.")
    if isinstance(dataset, tuple | list) and are_inputs_and_targets(dataset):
        shapes = " and ".join(str(tuple(part.shape)) for part in dataset)
        raise DataError(
            f"Got a {type(dataset).__name__} of two arrays with the shapes {shapes}, which would be a dataset of two "
            "samples. For inputs and targets, give TensorDataset(inputs, targets), from torch.utils.data."
        )


def choose_one(data: Mapping[Any, Any]) -> str:
    """Return how to get one dataset of a mapping of datasets, or of columns.

    Example:
        >>> choose_one({"train": [1, 2], "test": [3]})
        "Pass one of its values, such as data['train']. Only evaluations take several datasets by name."
    """
    if data and all(isinstance(column, torch.Tensor | np.ndarray) for column in data.values()):
        return "For columns of equal length, give StackDataset(**columns), from torch.utils.data."
    such_as = f", such as data[{next(map(str, data))!r}]" if data else ""
    return f"Pass one of its values{such_as}. Only evaluations take several datasets by name."


def are_inputs_and_targets(parts: Sequence[Any]) -> bool:
    """Return whether a sequence is two arrays of as many rows, which differ: not two samples of one dataset.

    Two samples in a list may have different shapes, for a collate function that pads them.

    Example:
        >>> are_inputs_and_targets((torch.zeros(100, 4), torch.zeros(100)))
        True
        >>> are_inputs_and_targets([torch.zeros(3, 32, 32), torch.zeros(3, 32, 48)])
        False
    """
    if len(parts) != 2 or not all(hasattr(part, "shape") and hasattr(part, "dtype") for part in parts):
        return False
    first, second = parts
    differ = (first.ndim, first.dtype) != (second.ndim, second.dtype)
    if isinstance(parts, tuple):
        differ = differ or first.shape != second.shape
    return differ and bool(first.ndim and second.ndim) and bool(first.shape[0] == second.shape[0])


def limit_from_environment(limit: int | None) -> int | None:
    """Return `limit`, or else that of the environment variable `PTACC_LIMIT_BATCHES`, or None."""
    text = os.environ.get(LIMIT_VARIABLE)
    if limit is None and text:
        if not text.isdigit():
            raise OptionError(f"{LIMIT_VARIABLE}={text!r}: must be a whole number of batches.")
        limit = int(text)
    if limit is not None:
        check_at_least("train", "limit_batches", limit, 1)
    return limit
