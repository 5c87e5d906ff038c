"""Replay: data without a saved position is read again from its beginning when a run resumes within an epoch."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from ptacc.data.batch import BatchSource
from ptacc.errors import DataError
from ptacc.tensors.structures import as_bytes, iterate_leaves
from ptacc.types.protocols import StateDict


class ReplaySource(BatchSource):
    """The base of sources that are replayed.

    Their state holds a digest of the last batch, and the loader's own generators as they were when the epoch began. A
    replay that gives another batch in its place would repeat or skip samples, and raises an error.

    Args:
        owner: A loader or a dataset, which is searched for generators.
    """

    def __init__(self, owner: object) -> None:
        self._owner_name = type(owner).__name__
        self._generators = list(find_generators(owner))
        self._states_at_start: list[Tensor] = []
        self._last_batch: tuple[int, object] = (0, None)  # its offset, and the batch
        self._expected: tuple[int, str] | None = None
        self._saved: StateDict = {}

    def _start_epoch(self, start: int) -> StateDict:
        """Restore a saved state, and return it. It is empty for an epoch that is not resumed."""
        saved, self._saved = self._saved, {}
        for generator, state in zip(self._generators, saved.get("before" if start else "now", []), strict=False):
            generator.set_state(state)
        self._states_at_start = [generator.get_state() for generator in self._generators]
        self._expected = saved.get("last") if start else None
        return saved

    def _check_replayed(self, batch: object, end: int) -> None:
        """Compare a batch that was read with the last one that was read before the run was saved, if it is that one.

        Raises:
            DataError: They differ.
        """
        self._last_batch = (end, batch)
        if self._expected is not None and self._expected[0] == end and self._expected[1] != compute_digest(batch):
            raise DataError(
                f"{self._owner_name} was read again up to where the run was saved, and gave another batch there: its "
                "order differs each time it is read. Derive the order from the epoch, which `set_epoch` receives, or "
                "from torch's, NumPy's or Python's generator."
            )

    @override
    def state_dict(self) -> StateDict:
        if self._saved:  # it takes effect when the next epoch begins
            return copy.deepcopy(self._saved)
        end, batch = self._last_batch
        now = [generator.get_state() for generator in self._generators]
        return {"before": self._states_at_start, "now": now, "last": (end, compute_digest(batch))}

    @override
    def load_state_dict(self, state_dict: StateDict) -> None:
        self._saved = state_dict


def find_generators(owner: object) -> Iterator[torch.Generator]:
    """Iterate over the generators of a loader, of its samplers and of its dataset, each once."""
    batch_sampler = getattr(owner, "batch_sampler", None)
    objects = (
        owner,
        getattr(owner, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
        getattr(owner, "dataset", None),
    )
    generators = (getattr(obj, "generator", None) for obj in objects)
    yield from {id(found): found for found in generators if isinstance(found, torch.Generator)}.values()


def compute_digest(batch: object) -> str:
    """Return a digest of the tensors, arrays, images, strings and numbers in a batch. Other objects are left out."""
    digest = hashlib.sha256()
    for path, leaf in iterate_leaves(batch):
        digest.update(path.encode())
        if hasattr(leaf, "__array_interface__"):  # an array, or an image
            leaf = np.asarray(leaf).tobytes()
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{list(leaf.shape)}".encode())
            digest.update(as_bytes(leaf))
        elif isinstance(leaf, str | bytes | int | float | complex | None):
            digest.update(repr(leaf).encode())
    return digest.hexdigest()
