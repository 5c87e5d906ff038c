"""Replay: data without a saved position is read again from its beginning when a run resumes within an epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from typing_extensions import override

from ptacc.data.batch import BatchSource
from ptacc.errors import DataError
from ptacc.tensors.structures import as_bytes, iterate_tensors
from ptacc.types.protocols import StateDict


class ReplaySource(BatchSource):
    """The base of sources that are replayed.

    Their state holds a digest of the last batch, and the loader's own generators as they were when the epoch began. A
    replay that ends in another batch would repeat or skip samples, and raises an error.

    Args:
        owner: A loader or a dataset, which is searched for generators.
    """

    def __init__(self, owner: object) -> None:
        self._owner_name = type(owner).__name__
        self._generators = list(find_generators(owner))
        self._states_at_start: list[Tensor] = []
        self._last_batch: object = None
        self._saved: StateDict = {}

    def _start_epoch(self, start: int) -> str | None:
        """Restore a saved state. Return the digest of the last batch before `start`, None if unknown."""
        saved, self._saved = self._saved, {}
        for generator, state in zip(self._generators, saved.get("before" if start else "now", []), strict=False):
            generator.set_state(state)
        self._states_at_start = [generator.get_state() for generator in self._generators]
        return saved.get("last") if start else None

    def _check_replayed(self, batch: object, expected: str | None) -> None:
        """Compare the last batch that a replay skips with the one after which the run was saved.

        Raises:
            DataError: They differ.
        """
        if expected is not None and compute_digest(batch) != expected:
            raise DataError(
                f"{self._owner_name} was read again up to where the run was saved, and gave another batch there: its "
                "order differs each time it is read. Derive the order from the epoch, which `set_epoch` receives, or "
                "from torch's, NumPy's or Python's generator."
            )
        self._last_batch = batch

    @override
    def state_dict(self) -> StateDict:
        now = [generator.get_state() for generator in self._generators]
        return {"before": self._states_at_start, "now": now, "last": compute_digest(self._last_batch)}

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
    """Return a digest of the tensors in a batch."""
    digest = hashlib.sha256()
    for tensor in iterate_tensors(batch):
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()
