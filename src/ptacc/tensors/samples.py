"""Splits the outputs of a batch into one prediction for each sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np
from torch import Tensor

from ptacc.errors import DataError
from ptacc.tensors.structures import leading_dimension, open_container


class SampleSplitter:
    """Splits the outputs of batches into one for each sample.

    - Tensors and arrays are split along their first dimension, which is the batch.
    - A list holds one prediction for each sample, of any type.
    - Dictionaries, named tuples and dataclasses are split part by part. A part may be None.
    - A tuple is split part by part if that is possible, and else holds one prediction for each sample. If both are
      possible, it is read as the tuples of earlier batches.

    Args:
        owner: The method whose outputs are split, for error messages.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._tuples_have_parts: dict[str, bool] = {}

    def split(self, outputs: Any, count: int, path: str = "") -> list[Any]:
        """Return the outputs of a batch for each of its `count` samples. `path` is their place, for errors.

        Raises:
            DataError: A part of the outputs cannot be split, or can be split in two ways.
        """
        if isinstance(outputs, Tensor | np.ndarray) and outputs.ndim and outputs.shape[0] == count:
            return [outputs[index] for index in range(count)]
        if isinstance(outputs, list) and len(outputs) == count:
            return outputs
        if type(outputs) is tuple and not self._has_parts(outputs, count, path):
            return list(outputs)
        if isinstance(outputs, list) or (opened := open_outputs(outputs)) is None:
            self._refuse(outputs, count, path)
        parts, rebuild = opened
        columns = {
            key: [None] * count if part is None else self.split(part, count, f"{path}[{key!r}]")
            for key, part in parts.items()
        }
        return [rebuild({key: column[index] for key, column in columns.items()}) for index in range(count)]

    def _has_parts(self, outputs: tuple[Any, ...], count: int, path: str) -> bool:
        """Return whether a tuple is to be split part by part, and does not hold one prediction for each sample."""
        has_parts = self._tuples_have_parts.get(path)
        if has_parts is None:
            has_parts = len(outputs) != count or all(is_splittable(part, count) for part in outputs)
            if has_parts and len(outputs) == count:
                raise DataError(
                    f"{self._owner}: output{path} is a tuple of {count} for {count} samples: either one prediction for "
                    "each sample, or parts to be split. Return a list for the first, a dictionary for the second."
                )
            self._tuples_have_parts[path] = has_parts
        if not has_parts and len(outputs) != count:
            self._refuse(outputs, count, path)
        return has_parts

    def _refuse(self, outputs: object, count: int, path: str) -> NoReturn:
        shape = getattr(outputs, "shape", None)
        form = f" of shape {tuple(shape)}" if shape is not None else ""
        form = f" of length {len(outputs)}" if isinstance(outputs, list | tuple) else form
        raise DataError(
            f"{self._owner}: output{path} is a {type(outputs).__name__}{form}, which cannot be split into {count} "
            "samples. Return tensors whose first dimension is the batch, lists of one prediction for each sample, or "
            "dictionaries of them, and leave out the rest."
        )


def is_splittable(outputs: object, count: int) -> bool:
    """Return whether outputs can be split into `count` samples."""
    try:
        SampleSplitter("").split(outputs, count)
    except DataError:
        return False
    return True


def open_outputs(outputs: Any) -> tuple[Mapping[Any, Any], Callable[[dict[Any, Any]], Any]] | None:
    """Return what `open_container` does; None without parts."""
    opened = open_container(outputs)
    return opened if opened is not None and opened[0] else None


def count_samples(outputs: object, batch: object) -> int:
    """Return the number of samples of a batch that does not know it: by its outputs, or else by its own tensors."""
    if isinstance(outputs, list):
        return len(outputs)
    if isinstance(outputs, Tensor | np.ndarray) and outputs.ndim:
        return int(outputs.shape[0])
    opened = None if type(outputs) is tuple else open_outputs(outputs)
    for part in () if opened is None else opened[0].values():
        if isinstance(part, Tensor | np.ndarray) or type(part) is list:
            return count_samples(part, batch)
    return leading_dimension(batch)
