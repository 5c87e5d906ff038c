"""What was counted of a run's speed, and what follows from that."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class ThroughputRecord:
    """What training did in a stretch of time, over all processes, but for the memory, which is this process's.

    Args:
        step: The number of the last step.
        steps: How many steps.
        items: Items of these steps.
        samples: Samples of these steps; None where nobody counts them, or only each process its own, as where data of
            several has a `collate_fn`.
        seconds: Time spent on training.
        data_seconds: Of these, the time that this process waited for data.
        flops_per_item: Floating-point operations of a step, for each of its items; None where unknown.
        peak_flops: Such operations that all devices together can do in a second; None where unknown.
        host_memory: Bytes that this process occupied at most since it began; None where the system does not tell.
        device_memory: Bytes of tensors on the device at most since this process began; None without such a device.
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

    @property
    def steps_per_second(self) -> float:
        """Steps a second."""
        return self._rate(self.steps)

    @property
    def items_per_second(self) -> float:
        """Items a second: tokens, where `count_items` counts these."""
        return self._rate(self.items)

    @property
    def samples_per_second(self) -> float | None:
        """Samples a second, None where nobody counts them."""
        return None if self.samples is None else self._rate(self.samples)

    @property
    def data_wait(self) -> float:
        """The share of the time that was spent waiting for data, from 0 to 1."""
        return self.data_seconds / self.seconds if self.seconds else 0.0

    @property
    def flops_per_second(self) -> float | None:
        """Floating-point operations a second, None where those of an item are unknown."""
        return None if self.flops_per_item is None else self._rate(self.items * self.flops_per_item)

    @property
    def flops_utilisation(self) -> float | None:
        """The share of the peak that was reached, from 0 to 1; None where either is unknown."""
        if self.flops_per_second is None or self.peak_flops is None:
            return None
        return self.flops_per_second / self.peak_flops

    def values(self) -> dict[str, float]:
        """Return what is known, by the names that the history has: memory in GiB, samples where they are not the items.

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
        }
        return {name: value for name, value in values.items() if value is not None}

    def _rate(self, count: float) -> float:
        return count / self.seconds if self.seconds else 0.0


@dataclass
class ThroughputCounter:
    """What was counted, and a stopwatch for the time that training took.

    Args:
        steps: Steps.
        items: Items of these steps, over all processes.
        samples: Likewise; None once there were some that nobody counted.
        waited: Seconds that were spent waiting for data.
        seconds: Seconds until the stopwatch was last stopped.
        since: When it was started, None while it stands.
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
        """Stop it."""
        self.seconds, self.started_at = self.elapsed(now), None

    def elapsed(self, now: float) -> float:
        """Return what it shows."""
        return self.seconds + (0.0 if self.started_at is None else max(now - self.started_at, 0.0))

    def add_step(self, items: float, samples: int | None, waited: float) -> None:
        """Count a step."""
        self.steps, self.items, self.data_seconds = self.steps + 1, self.items + items, self.data_seconds + waited
        self.samples = None if self.samples is None or samples is None else self.samples + samples

    def record_since(self, earlier: ThroughputCounter, step: int, now: float) -> ThroughputRecord:
        """Return what was counted since an earlier count, until the step `step`."""
        known = self.samples is not None and earlier.samples is not None
        return ThroughputRecord(
            step=step,
            steps=self.steps - earlier.steps,
            items=self.items - earlier.items,
            samples=(self.samples or 0) - (earlier.samples or 0) if known else None,
            seconds=self.elapsed(now) - earlier.seconds,
            data_seconds=self.data_seconds - earlier.data_seconds,
        )
