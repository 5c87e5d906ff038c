"""What `train()` was asked for, checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from ptacc.errors import OptionError
from ptacc.keywords import DataLoaderKwargs, check_sharding
from ptacc.types import Cadence, Duration, Epochs, Sharding
from ptacc.validation import check_at_least, check_positive


@dataclass(frozen=True)
class RunOptions:
    """What `train()` was asked for; the options are those of `TrainOptions`.

    Args:
        num_epochs: Passes over the data at most.
        max_steps: Optimizer steps at most.
        max_time: Duration at most, in seconds or as a `timedelta`.
        collate_fn: The user's collate function.
    """

    num_epochs: int | None = None
    max_steps: int | None = None
    max_time: Duration | None = None
    collate_fn: Callable[[list[Any]], object] | None = None
    per_device_batch_size: int | None = None
    train_dataloader_kwargs: DataLoaderKwargs = field(default_factory=DataLoaderKwargs)
    eval_dataloader_kwargs: DataLoaderKwargs = field(default_factory=DataLoaderKwargs)
    sharding: Sharding = "auto"
    evaluate_every: Cadence = field(default_factory=lambda: Epochs(1))
    evaluate_first: bool = False
    limit_batches: int | None = None
    agree_every: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot be right."""
        for name in ("num_epochs", "max_steps", "per_device_batch_size", "limit_batches", "agree_every"):
            value = getattr(self, name)
            if value is not None:
                check_at_least("train", name, value, 1)
        if self.max_time is not None:
            check_positive("train", "max_time", self.max_seconds, "It is in seconds, or a timedelta.")
        check_sharding("train", self.sharding)
        if self.collate_fn is not None and not callable(self.collate_fn):
            raise OptionError(f"train(collate_fn={self.collate_fn!r}): must be a function of a list of samples.")
        if not isinstance(self.evaluate_every, Cadence):
            raise OptionError(
                f"train(evaluate_every={self.evaluate_every!r}): must be a cadence: Steps(500), Epochs(1) or "
                "Minutes(10)."
            )
        if self.num_epochs is None and self.max_steps is None and self.max_time is None:
            raise OptionError(
                "train() does not know when to end: give num_epochs or max_steps, or max_time, or several of them; "
                "whichever comes first ends the run."
            )

    def told(self) -> str:
        """Tell what has to be the same on all processes."""
        names = ("num_epochs", "max_steps", "evaluate_every", "evaluate_first", "limit_batches", "agree_every")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    @property
    def max_seconds(self) -> float | None:
        """`max_time` in seconds."""
        return self.max_time.total_seconds() if isinstance(self.max_time, timedelta) else self.max_time
