"""Which checkpoints of a run are kept, as a pure function of their manifests."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ptacc.storage.manifest import Manifest
from ptacc.types.monitor import Best, Monitor


@dataclass(frozen=True)
class Retention:
    """Rules for keeping checkpoints. A checkpoint is kept if any rule keeps it. Without a rule, all are kept.

    Args:
        last: How many of the newest to keep.
        best: How many of the best to keep, and by which value.
        every: Keep those whose step is a multiple of this.
    """

    last: int | None = None
    best: Best | None = None
    every: int | None = None

    def removable(self, manifests: Sequence[Manifest], protected: Collection[str] = ()) -> list[str]:
        """Return the names of the checkpoints to remove, oldest first.

        The newest of the intact checkpoints is always kept, and so are the newest of each label and those whose names
        are protected, such as the one that was resumed from.

        Example:
            >>> manifests = [Manifest(f"step-{n}", "run", n, 0, 0, 1, sequence=n) for n in (1, 2, 3, 4)]
            >>> Retention(last=1, every=2).removable(manifests, protected={"step-1"})
            ['step-3']
        """
        if self.last is None and self.best is None and self.every is None:
            return []
        by_age = sorted(manifests, key=lambda manifest: manifest.sequence)
        kept = {*protected, *(manifest.name for manifest in by_age[-(self.last or 1) :])}
        kept |= {manifest.name for manifest in by_age if self.every is not None and manifest.step % self.every == 0}
        newest_of_label = {manifest.label: manifest.name for manifest in by_age if manifest.label}
        kept |= {*newest_of_label.values()}
        if self.best is not None:
            best = rank_best(by_age, self.best.resolved_monitor)
            kept |= {manifest.name for manifest in best[: self.best.count]}
        return [manifest.name for manifest in by_age if manifest.name not in kept]


def rank_best(manifests: Sequence[Manifest], monitor: Monitor) -> list[Manifest]:
    """Return the checkpoints, best first. Those with NaN or no value are left out.

    The manifests are given oldest first. Of two with equal values, the newer one is better.
    """
    sign = 1 if monitor.mode == "min" else -1
    ranked = [
        manifest for manifest in reversed(manifests) if not math.isnan(manifest.metrics.get(monitor.name, math.nan))
    ]
    return sorted(ranked, key=lambda manifest: sign * manifest.metrics[monitor.name])


def add_if_best(values: Sequence[float], value: float, best: Best) -> list[float] | None:
    """Return the best values so far with another one, best first; None if it is not among the best.

    Example:
        >>> add_if_best([0.1, 0.5], 0.3, Best("eval_loss", count=2))
        [0.1, 0.3]
    """
    monitor = best.resolved_monitor
    if math.isnan(value) or (len(values) == best.count and not monitor.is_better(value, than=values[-1])):
        return None
    return sorted([*values, value], reverse=monitor.mode == "max")[: best.count]
