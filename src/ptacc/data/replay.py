"""Replaying: data that cannot say where it is, is read anew up to where a run goes on, and compared there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ptacc.errors import DataError
from ptacc.tensors.structures import as_bytes, iterate_tensors
from ptacc.types.protocols import StateDict


class ReplaySource:
    """The base of sources that are replayed.

    They remember the batch that was given last, and where the loader's own generators were when the epoch began. A
    replay that comes to another batch would train on samples twice, or never: it is refused.
    """

    def __init__(self, owner: object) -> None:
        """Look for generators in `owner`: a loader, its sampler, its batch sampler."""
        self._owner = type(owner).__name__
        self._generators = list(find_generators(owner))
        self._before: list[Tensor] = []
        self._last: object = None
        self._saved: StateDict = {}

    def _begin(self, start: int) -> str | None:
        """Begin an epoch from `start` on; return the digest of the last batch before it, where one is known."""
        saved, self._saved = self._saved, {}
        for generator, state in zip(self._generators, saved.get("before" if start else "now", []), strict=False):
            generator.set_state(state)
        self._before = [generator.get_state() for generator in self._generators]
        return saved.get("last") if start else None

    def _give(self, batch: Any) -> Any:
        """Remember a batch that is trained on."""
        self._last = batch
        return batch

    def _check(self, batch: object, expected: str | None) -> None:
        """Compare the last batch that a replay leaves out.

        Raises:
            DataError: It is another than the run was saved after.
        """
        if expected is not None and compute_digest(batch) != expected:
            raise DataError(
                f"{self._owner} was read anew up to where the run was saved, and another batch came there: its order "
                "is not the same each time. Derive it from the epoch, which `set_epoch` tells, or from torch's, "
                "NumPy's or Python's generator."
            )
        self._last = batch

    def state_dict(self) -> StateDict:
        """Return the generators' states at the epoch's beginning and now, and a digest of the last batch."""
        now = [generator.get_state() for generator in self._generators]
        return {"before": self._before, "now": now, "last": compute_digest(self._last)}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Read anew from where the generators were, when an epoch begins next."""
        self._saved = state_dict


def find_generators(owner: object) -> Iterator[torch.Generator]:
    """Iterate over the generators of a loader, of its samplers and of its dataset, each once."""
    batch_sampler = getattr(owner, "batch_sampler", None)
    places = (owner, getattr(owner, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    held = (getattr(place, "generator", None) for place in (*places, getattr(owner, "dataset", None)))
    found = {id(generator): generator for generator in held if isinstance(generator, torch.Generator)}
    yield from found.values()


def compute_digest(batch: object) -> str:
    """Return a digest of the tensors in a batch."""
    digest = hashlib.sha256()
    for tensor in iterate_tensors(batch):
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()
