"""Keywords: what `train`, `evaluate` and `predict` take beside the data, and what loaders take."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict, get_args

from torch.utils.data import Sampler

from ptacc.errors import OptionError
from ptacc.types import Cadence, Sharding


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
        sharding: `"already"` where the data of each process is its own already.
        limit_batches: Stop after this many batches a process: a smoke run. The environment variable
            `PTACC_LIMIT_BATCHES` does the same to `evaluate`; predictions stay whole.
    """

    per_device_batch_size: int | None
    dataloader_kwargs: DataLoaderKwargs
    sharding: Sharding
    limit_batches: int | None


class TrainOptions(TypedDict, total=False):
    """Options of `train` beside the data and the length of the run.

    Keys:
        per_device_batch_size: Samples a batch and process; 8 if not given.
        train_dataloader_kwargs: Keywords for the training DataLoader; it shuffles if not told otherwise.
        eval_dataloader_kwargs: Keywords for the DataLoaders of the evaluation sets.
        sharding: `"already"` where the data of each process is its own already.
        evaluate_every: `Epochs(1)` if not given, and always at the end of the run.
        evaluate_first: Evaluate before the first step, too.
        limit_batches: Take this many batches a process of each epoch and evaluation: a smoke run, schedule included.
            The environment variable `PTACC_LIMIT_BATCHES` does the same for a script that is not to be edited.
        agree_every: Steps between two agreements of the processes on stopping. If not given, as many as keep their
            cost below a hundredth, worked out in the first steps: 1 where steps are long. One process needs none.
    """

    per_device_batch_size: int | None
    train_dataloader_kwargs: DataLoaderKwargs
    eval_dataloader_kwargs: DataLoaderKwargs
    sharding: Sharding
    evaluate_every: Cadence
    evaluate_first: bool
    limit_batches: int | None
    agree_every: int | None


def check_sharding(call: str, sharding: object) -> None:
    """Raise `OptionError` for a way of sharding that there is not."""
    if sharding not in get_args(Sharding):
        raise OptionError(
            f'{call}(sharding={sharding!r}): must be "auto", or "already" where each process has its own data.'
        )
