"""The search for a batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import nn
from torch.distributed import is_initialized

from ptacc.distributed.process_group import DistributedRuntime
from ptacc.engines.default import TorchEngine
from ptacc.errors import ModelError, OptionError
from ptacc.loop.loop import TrainingLoop
from ptacc.profiling.memory import out_of_memory_message, total_memory
from ptacc.tuning.isolated import AnyLoop, check_map_style, repeat, search_copy
from ptacc.types.accumulation import as_accumulation
from ptacc.types.aliases import BatchT, OutputT, RawT, SampleT
from ptacc.types.arguments import DataLoaderKwargs
from ptacc.types.protocols import SizedDataset, SupportsGradAccum
from ptacc.validation import check_at_least


@dataclass(frozen=True)
class BatchSizeSearch:
    """The result of a search for a batch size, the same on every process.

    Args:
        per_device_batch_size: Samples of a batch of one process, for `train`.
        gradient_accumulation_steps: Batches of a step, for `GradAccumMixin`.
        processes: Number of processes. The product of these three is the global batch size.
        did_not_fit: The larger batch sizes that were tried, with the rank that ran out of memory and its error message.
    """

    per_device_batch_size: int
    gradient_accumulation_steps: int
    processes: int
    did_not_fit: Mapping[int, str] = field(default_factory=dict)


@overload
def find_batch_size(
    trainer: TrainingLoop[BatchT, OutputT, nn.Module, SampleT],
    train_dataset: SizedDataset[SampleT],
    *,
    global_batch_size: int,
    steps: int = 3,
    margin: float = 0.05,
    train_dataloader_kwargs: DataLoaderKwargs | None = None,
) -> BatchSizeSearch: ...
@overload
def find_batch_size(
    trainer: TrainingLoop[BatchT, OutputT, nn.Module, SampleT],
    train_dataset: SizedDataset[RawT],
    *,
    collate_fn: Callable[[list[RawT]], BatchT],
    global_batch_size: int,
    steps: int = 3,
    margin: float = 0.05,
    train_dataloader_kwargs: DataLoaderKwargs | None = None,
) -> BatchSizeSearch: ...
def find_batch_size(
    trainer: AnyLoop,
    train_dataset: SizedDataset[Any],
    *,
    collate_fn: Any = None,
    global_batch_size: int,
    steps: int = 3,
    margin: float = 0.05,
    train_dataloader_kwargs: DataLoaderKwargs | None = None,
) -> BatchSizeSearch:
    """Find the largest batch that fits in memory, and the number of batches a step that keeps the global batch.

    The search first tries one batch a step on each process. As long as memory runs out, it tries the next smaller size
    that divides the first one. The size changes memory use and speed, but not the training. Afterwards the weights, the
    optimizer and the random streams have their former state.

    All processes call this function. Each tries a size without communicating, because a rank that runs out of memory
    during a collective would block the others. After each try the processes exchange their results, and a size fits
    if it fits on all. During a try, as much memory as the gradients use is reserved for communicating them. A
    `train_step` that calls collectives other than `self.gather` cannot be tried.

    On a CPU, running out of memory raises an error only if the memory of the process is limited (`ulimit -v`).
    Otherwise the system kills the process.

    Args:
        trainer: The trainer, ready to train, with `GradAccumMixin`.
        train_dataset: Tried batches consist of its first samples. If samples differ in size, put the largest first.
        collate_fn: As for `train`.
        global_batch_size: Samples of a step over all processes, a multiple of their number.
        steps: Steps of each try, at least 2: optimizers allocate their state in the first one.
        margin: The fraction of a device's memory that has to stay free, from 0 to less than 1.
        train_dataloader_kwargs: As for `train`.

    Raises:
        OptionError: A number is out of its range, the trainer cannot accumulate, or its engine shards the weights.
        DataError: No samples, or data without a length and an index.
        ModelError: Not even one sample fits.
        RankFailedError: Another process failed with another error.
        NestedRunError: The trainer is running.

    Example:
        >>> from ptacc import GradAccumMixin, Trainer
        >>> from ptacc.testing import iris, iris_parts
        >>> class MyTrainer(GradAccumMixin, Trainer): ...
        >>> find_batch_size(MyTrainer(**iris_parts()), iris(), global_batch_size=64)
        BatchSizeSearch(per_device_batch_size=64, gradient_accumulation_steps=1, processes=1, did_not_fit={})
    """
    distributed = trainer.distributed
    assert isinstance(distributed, DistributedRuntime)
    with distributed.synced("find_batch_size()") as must_match:
        check_search(trainer, train_dataset, global_batch_size, steps, margin)
        must_match += [f"global_batch_size={global_batch_size}", f"steps={steps}"]
    share = global_batch_size // distributed.world_size
    options = {"max_steps": steps, "collate_fn": collate_fn, "train_dataloader_kwargs": train_dataloader_kwargs or {}}
    did_not_fit: dict[int, str] = {}
    for size in (size for size in range(share, 0, -1) if share % size == 0):
        # Of more batches, two are enough: from the second on, gradients already use memory in the forward pass.
        with distributed.synced("a try of find_batch_size()"):
            message = try_size(trainer, train_dataset, size, min(share // size, 2), margin, options)
        messages = distributed.gather(message)
        if not any(messages):
            return BatchSizeSearch(size, share // size, distributed.world_size, did_not_fit)
        did_not_fit[size] = next(f"rank {rank}: {message}" for rank, message in enumerate(messages) if message)
    raise ModelError(
        f"find_batch_size: a step of {type(trainer).__name__} with batches of one sample does not fit in memory: "
        f"{did_not_fit[1]}. Store fewer activations (GradCheckpointMixin), or shard the weights (FSDPMixin)."
    )


def check_search(trainer: AnyLoop, data: object, global_batch_size: int, steps: int, margin: float) -> None:
    """Validate the arguments of a search."""
    owner, processes = "find_batch_size", trainer.distributed.world_size
    check_map_style(owner, "train_dataset", data)
    check_at_least(owner, "global_batch_size", global_batch_size, 1)
    check_at_least(owner, "steps", steps, 2)
    if global_batch_size % processes:
        raise OptionError(
            f"{owner}(global_batch_size={global_batch_size}): {processes} processes cannot take equal parts of it. "
            f"Give a multiple of {processes}, such as {(global_batch_size // processes + 1) * processes}."
        )
    if not 0 <= margin < 1:
        raise OptionError(f"{owner}(margin={margin!r}): must be from 0 to less than 1, a fraction of the memory.")
    if not isinstance(trainer, SupportsGradAccum):
        raise OptionError(
            f"{owner}: {type(trainer).__name__} does not accumulate gradients, so smaller batches would change the "
            "training. Compose GradAccumMixin."
        )
    if (accumulation := as_accumulation(trainer.accumulation_steps())).later:
        raise OptionError(
            f"{owner}: the global batch of {type(trainer).__name__} changes during a run ({accumulation} batches per "
            "step). Leave accumulation_schedule out of the search."
        )
    engine = trainer.resume_invariants()["engine"]
    if engine != "torch" and is_initialized():
        raise OptionError(
            f"{owner}: the weights of {type(trainer).__name__} are sharded over the processes ({engine}), so no "
            "process can try a step alone. Try sizes with train(max_steps=3), each in its own launch."
        )


def try_size(
    trainer: AnyLoop, data: SizedDataset[Any], size: int, batches: int, margin: float, options: Mapping[str, Any]
) -> str | None:
    """Train with `batches` batches of `size` samples a step, on this process alone.

    Returns:
        The error message if memory runs out, None if it does not.
    """
    num_batches = batches * options["max_steps"]
    with search_copy(trainer, data, options["train_dataloader_kwargs"].get("sampler")) as trial:
        vars(trial)["gradient_accumulation_steps"] = batches
        if trainer.distributed.world_size > 1:
            make_independent(trial)

        def train() -> None:
            reserved = torch.empty(reserved_bytes(trainer, margin), dtype=torch.uint8, device=trainer.device)
            trial.train(
                repeat(data, len(data), size * num_batches),
                per_device_batch_size=size,
                limit_batches=num_batches,  # overrides the environment variable of smoke runs
                **options,
            )
            del reserved

        return out_of_memory_message(train)


def reserved_bytes(trainer: AnyLoop, margin: float) -> int:
    """Return the bytes of the margin, and of the buffers to which ranks copy gradients to reduce them."""
    total = int(margin * total_memory(trainer.device))
    if trainer.distributed.world_size > 1:
        total += sum(p.numel() * p.element_size() for p in trainer.trained_modules.parameters() if p.requires_grad)
    return total


def make_independent(trial: AnyLoop) -> None:
    """Make an isolated copy train as a single process, without the wrapper that reduces gradients over ranks."""
    runtime = trial.accelerator, DistributedRuntime()
    vars(trial)["_runtime"] = lambda: runtime
    vars(trial)["make_engine"] = lambda: TorchEngine(trial.accelerator, trial.unwrapped_model, trial.optimizer_slots())
