"""Retention: which checkpoints are kept. A pure function over what is on the disk."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ptacc.checkpoint.storage.manifest import Manifest
from ptacc.types.monitor import Monitor


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept: those that any of the rules keeps, and the newest of each label; without a rule, all.

    Args:
        last: How many of the newest.
        best: How many of the best, by `monitored`.
        every: Those whose step is a multiple of this.
        monitored: The value by which some are better.
    """

    last: int | None = None
    best: int | None = None
    every: int | None = None
    monitored: Monitor | None = None

    def removable(self, manifests: Sequence[Manifest], protected: Collection[str] = ()) -> list[str]:
        """Return the names of those that no rule keeps, the oldest first. The newest is always kept.

        Args:
            manifests: The whole checkpoints that there are.
            protected: Names of those to keep besides, such as the one that was resumed from.

        Example:
            >>> there = [Manifest(f"step-{n}", "run", n, 0, 0, 1, sequence=n) for n in (1, 2, 3, 4)]
            >>> Retention(last=1, every=2).removable(there, protected={"step-1"})
            ['step-3']
        """
        if self.last is None and self.best is None and self.every is None:
            return []
        by_age = sorted(manifests, key=lambda manifest: manifest.sequence)
        kept = {*protected, *(manifest.name for manifest in by_age[-max(self.last or 1, 1) :])}
        kept |= {manifest.name for manifest in by_age if self.every is not None and manifest.step % self.every == 0}
        newest_of_label = {manifest.label: manifest.name for manifest in by_age if manifest.label}
        kept |= {*newest_of_label.values()}
        if self.best is not None and self.monitored is not None:
            kept |= set(rank_best(by_age, self.monitored, self.best))
        return [manifest.name for manifest in by_age if manifest.name not in kept]


def rank_best(manifests: Sequence[Manifest], monitored: Monitor, count: int) -> list[str]:
    """Return the names of the best, the best first and of equals the newest; NaN and what has no value is never one."""
    sign = 1 if monitored.mode == "min" else -1
    values = {manifest.name: manifest.metrics.get(monitored.name, math.nan) for manifest in manifests}
    ranked = [manifest for manifest in reversed(manifests) if not math.isnan(values[manifest.name])]
    ranked.sort(key=lambda manifest: sign * values[manifest.name])
    return [manifest.name for manifest in ranked[:count]]
