"""The search for a batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, overload

from torch.distributed import is_initialized

from ptacc.distributed.process_group import DistributedRuntime
from ptacc.engines.ddp import TorchEngine
from ptacc.errors import ModelError, OptionError
from ptacc.loop.loop import TrainingLoop
from ptacc.tuning.isolated import AnyLoop, search_copy
from ptacc.tuning.memory import out_of_memory_message, reserve_memory, total_memory
from ptacc.tuning.subset import Subset, check_map_style
from ptacc.types.aliases import BatchT, OutputT, RawT, SampleT
from ptacc.types.arguments import DataLoaderKwargs
from ptacc.types.protocols import SizedDataset, SupportsGradAccum
from ptacc.validation import check_at_least

MAX_BATCHES = 2
"""Batches of a step that are tried, at most. From the second one on, gradients already use memory in the forward pass.
"""


@dataclass(frozen=True)
class BatchSizeSearch:
    """The result of a search for a batch size, the same on every process.

    Args:
        per_device_batch_size: Samples of a batch of one process, for `train`.
        gradient_accumulation_steps: Batches of a step, for `GradAccumMixin`.
        processes: Number of processes. The product of these three is the global batch size.
        did_not_fit: The larger sizes that were tried, each with the rank that ran out of memory and its error.
    """

    per_device_batch_size: int
    gradient_accumulation_steps: int
    processes: int
    did_not_fit: Mapping[int, str] = field(default_factory=dict)


@overload
def find_batch_size(
    trainer: TrainingLoop[BatchT, OutputT, SampleT],
    train_dataset: SizedDataset[SampleT],
    *,
    global_batch_size: int,
    steps: int = 3,
    margin: float = 0.05,
    train_dataloader_kwargs: DataLoaderKwargs | None = None,
) -> BatchSizeSearch: ...
@overload
def find_batch_size(
    trainer: TrainingLoop[BatchT, OutputT, SampleT],
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
    collate_fn: Callable[[list[Any]], Any] | None = None,
    global_batch_size: int,
    steps: int = 3,
    margin: float = 0.05,
    train_dataloader_kwargs: DataLoaderKwargs | None = None,
) -> BatchSizeSearch:
    """Find the largest batch that fits in memory, and the number of batches a step that keeps the global batch.

    The search first tries one batch a step on each process, then the next smaller size that divides it, and so on. The
    size changes memory use and speed, and not what is trained. Afterwards the weights, the optimizer and the random
    streams have their former state.

    All processes call this function. Each tries a size without communicating, because a rank that runs out of memory
    during a collective would block the others. After each try the processes exchange their results, and a size fits
    if it fits on all. During a try, memory is reserved for the communication of gradients: as much as these take. A
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
    did_not_fit: dict[int, str] = {}
    for size in (size for size in range(share, 0, -1) if share % size == 0):
        attempt = Attempt(size, share // size, steps, margin, collate_fn, train_dataloader_kwargs or {})
        with distributed.synced("a try of find_batch_size()"):
            message = attempt.run(trainer, train_dataset)
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
        below = global_batch_size - global_batch_size % processes
        raise OptionError(
            f"{owner}(global_batch_size={global_batch_size}): {processes} processes cannot take equal parts of it. "
            f"Give a multiple of {processes}, such as {below + processes}."
        )
    if not 0 <= margin < 1:
        raise OptionError(f"{owner}(margin={margin!r}): must be from 0 to less than 1, a fraction of the memory.")
    if not isinstance(trainer, SupportsGradAccum):
        raise OptionError(
            f"{owner}: {type(trainer).__name__} takes one batch a step, so smaller batches would change the training. "
            "Compose GradAccumMixin."
        )
    engine = trainer.resume_invariants()["engine"]
    if engine != "torch" and is_initialized():
        raise OptionError(
            f"{owner}: the weights of {type(trainer).__name__} are sharded over the processes ({engine}), so no "
            "process can try a step alone. Try sizes with train(max_steps=3), each in its own launch."
        )


@dataclass(frozen=True)
class Attempt:
    """One try of a batch size, by this process alone.

    Args:
        size: Samples of a batch.
        batches: Batches of a step, of which at most two are tried.
        steps: Steps to take.
        margin: The fraction of the device's memory that is reserved.
        collate_fn: The user's collate function, None for torch's own.
        loader_kwargs: Keywords of the loader.
    """

    size: int
    batches: int
    steps: int
    margin: float
    collate_fn: Callable[[list[Any]], Any] | None
    loader_kwargs: DataLoaderKwargs

    def run(self, trainer: AnyLoop, data: SizedDataset[Any]) -> str | None:
        """Train for some steps, and return the error message if memory runs out; None if it does not."""
        batches = min(self.batches, MAX_BATCHES)
        options: dict[str, Any] = {} if self.collate_fn is None else {"collate_fn": self.collate_fn}
        with search_copy(trainer, data, self.loader_kwargs.get("sampler")) as trial:
            vars(trial)["gradient_accumulation_steps"] = batches
            if trainer.distributed.world_size > 1:
                make_independent(trial)

            def train() -> None:
                with reserve_memory(self._reserved_bytes(trainer), trainer.device):
                    trial.train(
                        Subset(data, len(data), self.size * batches * self.steps),
                        max_steps=self.steps,
                        per_device_batch_size=self.size,
                        train_dataloader_kwargs=self.loader_kwargs,
                        limit_batches=batches * self.steps,  # overrides the environment variable of smoke runs
                        **options,
                    )

            return out_of_memory_message(train)

    def _reserved_bytes(self, trainer: AnyLoop) -> int:
        """Return the bytes of the margin, and of the buffers to which ranks copy gradients to reduce them."""
        reduced = [
            p for p in trainer.unwrapped_model.parameters() if p.requires_grad and trainer.distributed.world_size > 1
        ]
        buffers = sum(parameter.numel() * parameter.element_size() for parameter in reduced)
        return buffers + int(self.margin * total_memory(trainer.device))


def make_independent(trial: AnyLoop) -> None:
    """Make an isolated copy train as a single process, without the wrapper that reduces gradients over ranks."""
    runtime = trial.accelerator, DistributedRuntime()
    vars(trial)["_runtime"] = lambda: runtime
    vars(trial)["make_engine"] = lambda: TorchEngine(
        trial.accelerator, trial.unwrapped_model, trial.optimizer_slots(), is_replicated=False
    )
