"""Keywords: what `train`, `evaluate` and `predict` take beside the data, and what loaders take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypedDict

from torch.utils.data import Sampler

from ptacc.errors import OptionError
from ptacc.types.aliases import Duration
from ptacc.types.progress import Cadence, Epochs
from ptacc.validation import check_at_least, check_positive


class DataLoaderKwargs(TypedDict, total=False):
    """Keywords of `torch.utils.data.DataLoader` that a trainer passes on. The number of workers is 0 if not given."""

    shuffle: bool
    sampler: Sampler[int]
    batch_sampler: Sampler[list[int]]
    drop_last: bool
    num_workers: int
    pin_memory: bool
    prefetch_factor: int
    persistent_workers: bool
    timeout: float
    worker_init_fn: Callable[[int], None]
    multiprocessing_context: str


class EvalOptions(TypedDict, total=False):
    """Options of `evaluate` and `predict`.

    Keys:
        per_device_batch_size: Samples a batch and process; 8 if not given.
        dataloader_kwargs: Keywords for the DataLoader.
        data_is_sharded: Whether each process has its own data already. False if not given.
        limit_batches: Stop after this many batches a process: a smoke run. The environment variable
            `PTACC_LIMIT_BATCHES` does the same to `evaluate`; predictions stay whole.
    """

    per_device_batch_size: int | None
    dataloader_kwargs: DataLoaderKwargs
    data_is_sharded: bool
    limit_batches: int | None


class TrainOptions(TypedDict, total=False):
    """Options of `train` beside the data and the length of the run.

    Keys:
        per_device_batch_size: Samples a batch and process; 8 if not given.
        train_dataloader_kwargs: Keywords for the training DataLoader; it shuffles if not told otherwise.
        eval_dataloader_kwargs: Keywords for the DataLoaders of the evaluation sets.
        data_is_sharded: Whether each process has its own data already. False if not given.
        evaluate_every: `Epochs(1)` if not given, and always at the end of the run.
        evaluate_first: Evaluate before the first step, too.
        limit_batches: Take this many batches a process of each epoch and evaluation: a smoke run, schedule included.
            The environment variable `PTACC_LIMIT_BATCHES` does the same for a script that is not to be edited.
        stop_check_every: Steps between two votes of the ranks on requests to stop (early stopping, `trainer.stop()`);
            16 if not given. Signals and `max_time` are voted on after each step that takes over half a second, too. One
            process stops after the step that it is at.
    """

    per_device_batch_size: int | None
    train_dataloader_kwargs: DataLoaderKwargs
    eval_dataloader_kwargs: DataLoaderKwargs
    data_is_sharded: bool
    evaluate_every: Cadence
    evaluate_first: bool
    limit_batches: int | None
    stop_check_every: int


def check_data_is_sharded(call: str, value: object) -> None:
    """Raise `OptionError` for anything but a bool."""
    if not isinstance(value, bool):
        raise OptionError(f"{call}(data_is_sharded={value!r}): must be True where each process has its own data.")


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
    data_is_sharded: bool = False
    evaluate_every: Cadence = field(default_factory=lambda: Epochs(1))
    evaluate_first: bool = False
    limit_batches: int | None = None
    stop_check_every: int = 16

    def __post_init__(self) -> None:
        """Refuse values that cannot be right."""
        for name in ("num_epochs", "max_steps", "per_device_batch_size", "limit_batches", "stop_check_every"):
            value = getattr(self, name)
            if value is not None or name == "stop_check_every":
                check_at_least("train", name, value, 1)
        if self.max_time is not None:
            check_positive("train", "max_time", self.max_seconds, "It is in seconds, or a timedelta.")
        check_data_is_sharded("train", self.data_is_sharded)
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

    def fingerprint(self) -> str:
        """Tell what has to be the same on all processes."""
        names = ("num_epochs", "max_steps", "evaluate_every", "evaluate_first", "limit_batches", "stop_check_every")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    @property
    def max_seconds(self) -> float | None:
        """`max_time` in seconds."""
        return self.max_time.total_seconds() if isinstance(self.max_time, timedelta) else self.max_time
