"""The keyword arguments of `train`, `evaluate` and `predict`, and of DataLoaders.

Those that a signature unpacks are closed: ty would accept any other keyword for an open one.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Required

from torch.utils.data import Sampler
from typing_extensions import TypedDict

from ptacc.errors import OptionError
from ptacc.types.aliases import Duration
from ptacc.types.progress import Cadence, Epochs
from ptacc.validation import check_at_least, check_positive


class DataLoaderKwargs(TypedDict, total=False):
    """Keywords of `torch.utils.data.DataLoader`, with torch's meaning and defaults where not noted otherwise.

    Keys:
        shuffle: Shuffle the samples in each epoch. Default: True for training data, False for evaluation data.
        sampler: Determines the order of the samples, in place of `shuffle`.
        batch_sampler: Determines the samples of each batch, in place of `per_device_batch_size`, `shuffle`, `sampler`
            and `drop_last`.
        drop_last: Leave out the last batch of an epoch if it is smaller than the others. Default: False.
        num_workers: Processes that load batches. Default: 0, loading in the main process.
        pin_memory: Copy batches to pinned memory. Default: True if the device is a GPU.
        prefetch_factor: Batches that each worker loads in advance.
        persistent_workers: Keep the workers running between epochs. Default: False.
        timeout: Seconds to wait for a batch from a worker. Default: 0, no limit.
        worker_init_fn: Called in each worker with its number.
        multiprocessing_context: How workers are started: `"fork"`, `"spawn"` or `"forkserver"`.
    """

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


class EvalOptions(TypedDict, total=False, closed=True):
    """Options of `evaluate`, `predict` and `stream_predictions`.

    Keys:
        per_device_batch_size: Samples per batch and process. Default: 8.
        dataloader_kwargs: Keywords for the DataLoader.
        data_is_sharded: Whether each process has its own part of the data already. Default: False, each process has
            all of the data, and ptacc splits it.
        limit_batches: Use only this many batches per process, for a smoke run. Default: the environment variable
            `PTACC_LIMIT_BATCHES` in `evaluate`, which predictions ignore; otherwise no limit.
        seed_every_batch: As for `train`.
    """

    per_device_batch_size: int | None
    dataloader_kwargs: DataLoaderKwargs
    data_is_sharded: bool
    limit_batches: int | None
    seed_every_batch: bool


class TrainOptions(TypedDict, total=False):
    """Options of `train`, in addition to the data and the length of the run.

    Keys:
        per_device_batch_size: Samples per batch and process, in training and evaluation. Default: 8.
        train_dataloader_kwargs: Keywords for the training DataLoader, which shuffles by default.
        eval_dataloader_kwargs: Keywords for the DataLoaders of the evaluation sets.
        data_is_sharded: Whether each process has its own part of the training data already. Default: False, each
            process has all of the data, and ptacc splits it.
        evaluate_every: How often to evaluate: `Steps(n)`, `Epochs(n)`, `Minutes(n)` or `Items(n)`. Default:
            `Epochs(1)`. A run that ends as planned is always evaluated at its end.
        evaluate_first: Also evaluate before the first step. Default: False.
        limit_batches: Use only this many batches per process of each epoch and each evaluation, for a smoke run. The
            schedule is planned for the limited epochs. Default: the environment variable `PTACC_LIMIT_BATCHES`,
            otherwise no limit.
        seed_every_batch: Seed the global generators of Python, NumPy and torch for every batch that the main process
            loads. Default: False, those that earlier batches were seen to draw from.
        stop_check_every: Steps between two votes of the ranks on requests to stop, such as early stopping and
            `trainer.stop()`. Default: 16. Signals and `max_time` are also voted on after each step that takes over half
            a second. One process stops after the current step.
    """

    per_device_batch_size: int | None
    train_dataloader_kwargs: DataLoaderKwargs
    eval_dataloader_kwargs: DataLoaderKwargs
    data_is_sharded: bool
    evaluate_every: Cadence
    evaluate_first: bool
    limit_batches: int | None
    seed_every_batch: bool
    stop_check_every: int


class EpochLimited(TrainOptions, total=False, closed=True):
    """Options of a run that is limited by epochs, and optionally by steps, items or time."""

    num_epochs: Required[int]
    max_steps: int | None
    max_items: float | None
    max_time: Duration | None


class StepLimited(TrainOptions, total=False, closed=True):
    """Options of a run that is limited by steps, and optionally by epochs, items or time."""

    num_epochs: int | None
    max_steps: Required[int]
    max_items: float | None
    max_time: Duration | None


class OptionallyLimited(TrainOptions, total=False, closed=True):
    """Options of a run that is limited by epochs, steps or both, each of which may be None, as from a command line."""

    num_epochs: Required[int | None]
    max_steps: Required[int | None]
    max_items: float | None
    max_time: Duration | None


class ItemLimited(TrainOptions, total=False, closed=True):
    """Options of a run that is limited by items, and optionally by epochs, steps or time."""

    num_epochs: int | None
    max_steps: int | None
    max_items: Required[float]
    max_time: Duration | None


class TimeLimited(TrainOptions, total=False, closed=True):
    """Options of a run that is limited by time, and optionally by epochs, steps or items."""

    num_epochs: int | None
    max_steps: int | None
    max_items: float | None
    max_time: Required[Duration]


class RunOptions(TrainOptions):
    """All arguments of a call of `train` except for the datasets."""

    num_epochs: int | None
    max_steps: int | None
    max_items: float | None
    max_time: Duration | None
    collate_fn: Callable[[list[Any]], object] | None


LIMITS = ("num_epochs", "max_steps", "max_items", "max_time")
"""Arguments of `train` that end a run."""
DEFAULT_CADENCE = Epochs(1)
"""How often a run is evaluated by default."""
DEFAULT_STOP_CHECK_EVERY = 16
"""Steps between two votes on stopping, by default."""


def check_flag(call: str, name: str, value: object) -> None:
    """Raise `OptionError` for a value that is not a bool."""
    if not isinstance(value, bool):
        raise OptionError(f"{call}({name}={value!r}): must be True or False.")


def check_run_options(options: RunOptions) -> None:
    """Raise `OptionError` for invalid values, and for a run without a limit."""
    for name in ("num_epochs", "max_steps", "per_device_batch_size", "limit_batches"):
        if (value := options.get(name)) is not None:
            check_at_least("train", name, value, 1)
    check_at_least("train", "stop_check_every", options.get("stop_check_every", DEFAULT_STOP_CHECK_EVERY), 1)
    if options["max_items"] is not None:
        check_positive("train", "max_items", options["max_items"], "It is a number of samples or tokens.")
    if options["max_time"] is not None:
        check_positive("train", "max_time", max_seconds(options), "It is in seconds, or a timedelta.")
    for flag in ("data_is_sharded", "seed_every_batch"):
        check_flag("train", flag, options.get(flag, False))
    collate_fn, cadence = options["collate_fn"], options.get("evaluate_every", DEFAULT_CADENCE)
    if collate_fn is not None and not callable(collate_fn):
        raise OptionError(f"train(collate_fn={collate_fn!r}): must be a function of a list of samples.")
    if not isinstance(cadence, Cadence):
        raise OptionError(
            f"train(evaluate_every={cadence!r}): must be a cadence: Steps(500), Epochs(1), Minutes(10) or "
            "Items(10_000)."
        )
    if options["num_epochs"] is None and not ends_within_epoch(options):
        raise OptionError(
            "train() does not know when to end: give num_epochs, max_steps, max_items or max_time, or several of them; "
            "whichever comes first ends the run."
        )


def options_fingerprint(options: RunOptions) -> str:
    """Describe the options that must be the same on all ranks."""
    names = (
        "num_epochs",
        "max_steps",
        "max_items",
        "evaluate_every",
        "evaluate_first",
        "limit_batches",
        "stop_check_every",
    )
    with_defaults = {
        "evaluate_every": DEFAULT_CADENCE,
        "evaluate_first": False,
        "stop_check_every": DEFAULT_STOP_CHECK_EVERY,
        **options,
    }
    return ", ".join(f"{name}={with_defaults.get(name)}" for name in names)


def ends_within_epoch(options: RunOptions) -> bool:
    """Return whether a run has a limit that it reaches also in an epoch without an end."""
    return any(options.get(name) is not None for name in LIMITS if name != "num_epochs")


def max_seconds(options: RunOptions) -> float | None:
    """Return `max_time` in seconds."""
    max_time = options["max_time"]
    return max_time.total_seconds() if isinstance(max_time, timedelta) else max_time
