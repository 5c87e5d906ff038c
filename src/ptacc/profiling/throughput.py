"""Counts and rates of training throughput."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class ThroughputRecord:
    """Throughput over a number of steps. Counts cover all ranks; times and memory are those of this process.

    Args:
        step: The number of the last step.
        steps: The number of steps.
        items: Items of these steps.
        samples: Samples of these steps, None if unknown. They are unknown for data that yields batches, and for data
            with a `collate_fn` on several ranks.
        seconds: Time spent training.
        data_seconds: The part of `seconds` that was spent waiting for data.
        flops_per_item: Floating-point operations of a step per item, None if unknown.
        peak_flops: Floating-point operations per second of all devices together, None if unknown.
        host_memory: Peak memory of this process in bytes, None if the platform does not report it.
        device_memory: Peak memory of tensors on the device in bytes, None for devices other than CUDA.
        slowest_rank: The rank that took longest to load data and to compute forward passes, in which it does not wait
            for others; None with one process, and in a summary.
        slowest_rank_ratio: Its time, divided by the mean over the ranks.
    """

    step: int
    steps: int
    items: float
    samples: int | None
    seconds: float
    data_seconds: float
    flops_per_item: float | None = None
    peak_flops: float | None = None
    host_memory: int | None = None
    device_memory: int | None = None
    slowest_rank: int | None = None
    slowest_rank_ratio: float | None = None

    @property
    def steps_per_second(self) -> float:
        """Steps per second."""
        return self._rate(self.steps)

    @property
    def items_per_second(self) -> float:
        """Items per second, such as tokens if `count_items` counts tokens."""
        return self._rate(self.items)

    @property
    def samples_per_second(self) -> float | None:
        """Samples per second, None if unknown."""
        return None if self.samples is None else self._rate(self.samples)

    @property
    def data_wait(self) -> float:
        """The fraction of the time that was spent waiting for data, from 0 to 1."""
        return self.data_seconds / self.seconds if self.seconds else 0.0

    @property
    def flops_per_second(self) -> float | None:
        """Floating-point operations per second, None if unknown."""
        return None if self.flops_per_item is None else self._rate(self.items * self.flops_per_item)

    @property
    def flops_utilisation(self) -> float | None:
        """The fraction of the peak FLOPS, from 0 to 1; None if unknown."""
        if self.flops_per_second is None or self.peak_flops is None:
            return None
        return self.flops_per_second / self.peak_flops

    def values(self) -> dict[str, float]:
        """Return the known values under their names in the history. Samples are left out if they equal the items.

        Example:
            >>> ThroughputRecord(step=9, steps=8, items=4096, samples=64, seconds=2.0, data_seconds=0.5).values()
            {'items_per_second': 2048.0, 'samples_per_second': 32.0, 'data_wait': 0.25}
        """
        values = {
            "items_per_second": self.items_per_second,
            "samples_per_second": None if self.samples == self.items else self.samples_per_second,
            "data_wait": self.data_wait,
            "flops_utilisation": self.flops_utilisation,
            "host_memory_gib": None if self.host_memory is None else self.host_memory / GIB,
            "device_memory_gib": None if self.device_memory is None else self.device_memory / GIB,
            "slowest_rank_ratio": self.slowest_rank_ratio,
        }
        return {name: value for name, value in values.items() if value is not None}

    def _rate(self, count: float) -> float:
        return count / self.seconds if self.seconds else 0.0


@dataclass
class ThroughputCounter:
    """Counts of steps, and a stopwatch.

    Args:
        steps: The number of steps.
        items: Items of these steps, over all ranks.
        samples: Samples of these steps, over all ranks; None once they are unknown for a step.
        data_seconds: Time spent waiting for data.
        seconds: Time on the stopwatch when it was last stopped.
        started_at: When the stopwatch was started, None while it is stopped.
    """

    steps: int = 0
    items: float = 0
    samples: int | None = 0
    data_seconds: float = 0.0
    seconds: float = 0.0
    started_at: float | None = None

    def start(self, now: float) -> None:
        """Start the stopwatch, unless it is running."""
        self.started_at = now if self.started_at is None else self.started_at

    def stop(self, now: float) -> None:
        """Stop the stopwatch."""
        self.seconds, self.started_at = self.elapsed(now), None

    def elapsed(self, now: float) -> float:
        """Return the time on the stopwatch."""
        return self.seconds + (0.0 if self.started_at is None else max(now - self.started_at, 0.0))

    def add_step(self, items: float, samples: int | None, data_seconds: float) -> None:
        """Count a step."""
        self.steps, self.items, self.data_seconds = self.steps + 1, self.items + items, self.data_seconds + data_seconds
        self.samples = None if self.samples is None or samples is None else self.samples + samples

    def record_since(self, earlier: ThroughputCounter, step: int, now: float) -> ThroughputRecord:
        """Return a record of what was counted since `earlier`, a copy of this counter; `step` is the last step."""
        is_unknown = self.samples is None or earlier.samples is None
        return ThroughputRecord(
            step=step,
            steps=self.steps - earlier.steps,
            items=self.items - earlier.items,
            samples=None if is_unknown else (self.samples or 0) - (earlier.samples or 0),
            seconds=self.elapsed(now) - earlier.seconds,
            data_seconds=self.data_seconds - earlier.data_seconds,
        )
