"""The search for a batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, overload

from torch.distributed import is_initialized
from torch.utils.data import DataLoader, IterableDataset, Subset

from ptacc.core.base import get_distributed_runtime
from ptacc.data.dataloader_config import check_dataset
from ptacc.engines.ddp import TorchEngine
from ptacc.errors import DataError, ModelError, OptionError
from ptacc.loop.loop import TrainingLoop
from ptacc.tuning.memory import out_of_memory_message, reserve_memory, total_memory
from ptacc.tuning.trial import AnyLoop, trial_of
from ptacc.types.aliases import BatchT, OutputT, RawT, SampleT
from ptacc.types.arguments import DataLoaderKwargs
from ptacc.types.protocols import SizedDataset, SupportsGradAccum
from ptacc.validation import check_at_least

BATCHES = 2
"""Batches of a tried step, at most: from the second one on, a forward pass finds gradients in memory."""


@dataclass(frozen=True)
class BatchSizeSearch:
    """What a search for a batch size found, the same on every process.

    Args:
        per_device_batch_size: Samples of a batch of one process, for `train`.
        gradient_accumulation_steps: Batches of a step, for `GradAccumMixin`.
        processes: Number of processes. The product of the three is the global batch that was asked for.
        did_not_fit: The larger sizes that were tried, each with the rank that ran out of memory and what it said.
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
    """Find the largest batches that fit in memory, with as many of them a step as keep the global batch what it is.

    A step is tried with the whole share of a process in one batch, then with the next smaller batch that divides it,
    and so on. What is trained does not change with it, only the memory and the time that it takes. Afterwards the
    weights, the optimizer and the random streams are what they were.

    All processes call it. Each tries by itself, since one that runs out of memory in the middle of an exchange could
    not be waited for; after each try they agree, and a size fits if it does on all of them. What the exchange takes is
    held back meanwhile: as much memory as the gradients. A `train_step` that talks to the other processes by means of
    its own, and not by `self.gather`, cannot be tried so.

    On a CPU, running out of memory is an error only where the memory of a process is limited (`ulimit -v`); elsewhere
    the system ends the process.

    Args:
        trainer: The trainer, ready to train, with `GradAccumMixin`.
        train_dataset: The tried batches are made of its first samples. Where samples differ in size, give the largest.
        collate_fn: As for `train`.
        global_batch_size: Samples of a step over all processes, a multiple of their number.
        steps: Steps of each try, at least 2: optimizers take their memory in the first one.
        margin: The part of a device's memory that has to be left over, from 0 to less than 1.
        train_dataloader_kwargs: As for `train`.

    Raises:
        OptionError: A number out of its range, a trainer that cannot accumulate, or an engine that deals weights out.
        DataError: No samples, or data without a length and an index.
        ModelError: Not even one sample fits.
        RankFailedError: Another process failed by something else.
        NestedRunError: A run of the trainer is under way.

    Example:
        >>> from ptacc import GradAccumMixin, Trainer
        >>> from ptacc.testing import iris, iris_parts
        >>> class MyTrainer(GradAccumMixin, Trainer): ...
        >>> find_batch_size(MyTrainer(**iris_parts()), iris(), global_batch_size=64)
        BatchSizeSearch(per_device_batch_size=64, gradient_accumulation_steps=1, processes=1, did_not_fit={})
    """
    distributed = get_distributed_runtime(trainer)
    with distributed.synced("find_batch_size()") as told:
        check_search(trainer, train_dataset, global_batch_size, steps, margin)
        told += [f"global_batch_size={global_batch_size}", f"steps={steps}"]
    share = global_batch_size // distributed.world_size
    did_not_fit: dict[int, str] = {}
    for size in (size for size in range(share, 0, -1) if share % size == 0):
        attempt = Attempt(size, share // size, steps, margin, collate_fn, train_dataloader_kwargs or {})
        with distributed.synced("a try of find_batch_size()"):
            complaint = attempt.make(trainer, train_dataset)
        complaints = distributed.gather(complaint)
        if not any(complaints):
            return BatchSizeSearch(size, share // size, distributed.world_size, did_not_fit)
        did_not_fit[size] = next(f"rank {rank}: {said}" for rank, said in enumerate(complaints) if said)
    raise ModelError(
        f"find_batch_size: a step of {type(trainer).__name__} with batches of one sample does not fit in memory: "
        f"{did_not_fit[1]}. Keep fewer activations (GradCheckpointMixin), or deal the weights out (FSDPMixin)."
    )


def check_search(trainer: AnyLoop, data: object, global_batch_size: int, steps: int, margin: float) -> None:
    """Raise for a search that cannot be made."""
    owner, processes = "find_batch_size", trainer.distributed.world_size
    if isinstance(data, DataLoader | IterableDataset):
        raise DataError(
            f"{owner}(train_dataset={type(data).__name__}(...)): batches are made of several sizes, which needs a "
            "dataset with a length and an index. Give `list(itertools.islice(stream, 100))`, or the loader's dataset "
            "and collate_fn."
        )
    check_dataset(data)
    check_at_least(owner, "global_batch_size", global_batch_size, 1)
    check_at_least(owner, "steps", steps, 2)
    if global_batch_size % processes:
        below = global_batch_size - global_batch_size % processes
        raise OptionError(
            f"{owner}(global_batch_size={global_batch_size}): {processes} processes cannot take equal parts of it. "
            f"Give a multiple of {processes}, such as {below + processes}."
        )
    if not 0 <= margin < 1:
        raise OptionError(f"{owner}(margin={margin!r}): must be from 0 to less than 1, a part of a device's memory.")
    if not isinstance(trainer, SupportsGradAccum):
        raise OptionError(
            f"{owner}: {type(trainer).__name__} takes one batch a step, so that smaller batches would be another "
            "training. Compose GradAccumMixin."
        )
    engine = trainer.resume_invariants()["engine"]
    if engine != "torch" and is_initialized():
        raise OptionError(
            f"{owner}: the weights of {type(trainer).__name__} are dealt out over the processes ({engine}), so that "
            "none can try a step by itself. Try sizes with train(max_steps=3), each in a launch of its own."
        )


@dataclass(frozen=True)
class Attempt:
    """A try of a batch size, by this process alone.

    Args:
        size: Samples of a batch.
        batches: Batches of a step, of which two are tried at most.
        steps: Steps to take.
        margin: The part of the device's memory that is held back.
        collate_fn: The user's collate function, None for torch's own.
        kwargs: Keywords of the loader.
    """

    size: int
    batches: int
    steps: int
    margin: float
    collate_fn: Callable[[list[Any]], Any] | None
    kwargs: DataLoaderKwargs

    def make(self, trainer: AnyLoop, data: SizedDataset[Any]) -> str | None:
        """Train for some steps, and return what is said as memory runs out; None if it does not."""
        batches = min(self.batches, BATCHES)
        count = self.size * batches * self.steps
        # torch's types want a dataset of its own kind, and its code any with an index.
        samples: Any = Subset(data, [i % len(data) for i in range(count)])  # type: ignore[arg-type]
        call: dict[str, Any] = {} if self.collate_fn is None else {"collate_fn": self.collate_fn}
        with trial_of(trainer, data, self.kwargs.get("sampler"), alone=True) as trial:
            vars(trial)["gradient_accumulation_steps"] = batches
            if trainer.distributed.world_size > 1:  # without the wrapper that exchanges gradients
                vars(trial)["make_engine"] = lambda: TorchEngine(
                    trial.accelerator, trial.unwrapped_model, trial.optimizer_slots(), is_replicated=False
                )

            def train() -> None:
                with reserve_memory(self._bytes_held_back(trainer), trainer.device):
                    trial.train(
                        samples,
                        max_steps=self.steps,
                        per_device_batch_size=self.size,
                        train_dataloader_kwargs=self.kwargs,
                        limit_batches=batches * self.steps,  # or a smoke run's environment variable would cut steps
                        **call,
                    )

            return out_of_memory_message(train)

    def _bytes_held_back(self, trainer: AnyLoop) -> int:
        """Return the bytes of the margin, and of what processes copy gradients to as they exchange them."""
        exchanged = [
            p for p in trainer.unwrapped_model.parameters() if p.requires_grad and trainer.distributed.world_size > 1
        ]
        buckets = sum(parameter.numel() * parameter.element_size() for parameter in exchanged)
        return buckets + int(self.margin * total_memory(trainer.device))
