"""Protocols of what users pass to trainers, of Accelerate's `Accelerator`, and of what each mixin adds.

Functions and callbacks require a protocol, not a mixin: `Callback[SupportsMetrics]` fits any trainer that has metrics,
also one that does not use `MetricsMixin`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from os import PathLike
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ptacc.types.aliases import Precision, T_co
from ptacc.types.progress import RunPlan

StateDict: TypeAlias = dict[str, Any]
"""A state dict, as torch's objects and their users' define it."""


# ---- what users pass to trainers


class SizedDataset(Protocol[T_co]):
    """A map-style dataset: it has a length and one sample for each index."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, index: int, /) -> T_co:
        """Return one sample."""
        ...


class StreamLike(Protocol[T_co]):
    """A stream that is not a torch `IterableDataset` to type checkers, as `datasets.IterableDataset`."""

    def __iter__(self) -> Iterator[T_co]:
        """Iterate over the samples."""
        ...

    def set_epoch(self, epoch: int, /) -> object:
        """Prepare the stream for an epoch."""
        ...

    def state_dict(self) -> StateDict:
        """Return the position in the stream."""
        ...


@runtime_checkable
class Stateful(Protocol):
    """An object whose state can be saved in a checkpoint."""

    def state_dict(self) -> StateDict:
        """Return the state as numbers, strings, tensors and containers of them."""
        ...

    def load_state_dict(self, state_dict: StateDict, /) -> object:
        """Restore a state that `state_dict` returned."""
        ...


class LRSchedulerLike(Stateful, Protocol):
    """A learning-rate schedule: any torch scheduler, or an object with the same three methods."""

    def step(self) -> object:
        """Advance the schedule by one step, or by one epoch."""
        ...


class PlateauSchedulerLike(Stateful, Protocol):
    """A schedule that depends on an evaluated value, as torch's `ReduceLROnPlateau`."""

    def step(self, metrics: float, /) -> object:
        """Advance the schedule, given the value of the last evaluation."""
        ...


class CountedSchedulerLike(Stateful, Protocol):
    """A schedule that is a function of the numbers of updates and epochs, as those of timm."""

    def step(self, epoch: int, metric: float | None = None) -> object:
        """Set the values for the next epoch, given the number of complete epochs."""
        ...

    def step_update(self, num_updates: int, metric: float | None = None) -> object:
        """Set the values for the next step, given the number of steps."""
        ...


SchedulerLike: TypeAlias = LRSchedulerLike | PlateauSchedulerLike | CountedSchedulerLike
SchedulerFactory: TypeAlias = Callable[[Optimizer, RunPlan], SchedulerLike]


class ParallelStyleLike(Protocol):
    """A torch `ParallelStyle`: how a layer is split over processes."""

    src_data_rank: int | None


# ---- what trainers have


class HasForward(Protocol[T_co]):
    """A module, as the type of its method `forward`."""

    @property
    def forward(self) -> T_co:
        """The method that computes the outputs."""
        ...


class HasModel(Protocol[T_co]):
    """Trainers of a class of models: `Callback[HasModel[GAN]]` works with every trainer whose model is a `GAN`."""

    @property
    def model(self) -> T_co:
        """The model; within a run, the wrapped one."""
        ...

    @property
    def unwrapped_model(self) -> T_co:
        """The model as it was passed to the trainer."""
        ...


# ---- what Accelerate provides


class AcceleratorProtocol(Protocol):
    """The type of `trainer.accelerator`: the part of `accelerate.Accelerator` that trainers and their users call.

    Accelerate has no type annotations. The project's stubs check that the class conforms to this protocol.
    """

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        ...

    @property
    def num_processes(self) -> int:
        """World size."""
        ...

    @property
    def process_index(self) -> int:
        """Rank of this process."""
        ...

    @property
    def local_process_index(self) -> int:
        """Rank of this process on its host."""
        ...

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0."""
        ...

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is the first process of its host."""
        ...

    @property
    def mixed_precision(self) -> str:
        """Precision of the forward pass: `"no"`, `"fp16"`, `"bf16"` or `"fp8"`."""
        ...

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The gradient scaler, None if the precision needs none."""
        ...

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Move a model to the device and wrap it for the processes and the precision."""
        ...

    def unwrap_model(
        self, model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True
    ) -> nn.Module:
        """Return the model without its wrappers."""
        ...

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Do not average gradients over the processes in the block: for all batches of a step but the last."""
        ...

    def autocast(self) -> AbstractContextManager[None]:
        """Run the block in the precision of the forward pass."""
        ...

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate tensors of equal shape over the processes along the first dimension."""
        ...

    def reduce(self, tensor: Tensor, reduction: str = "sum", scale: float = 1.0) -> Tensor:
        """Sum or average a tensor over the processes."""
        ...

    def wait_for_everyone(self) -> None:
        """Wait until every process has made this call."""
        ...

    def print(self, *args: object) -> None:
        """Print on the first process of each host."""
        ...


# ---- what mixins add


@runtime_checkable
class SupportsMixedPrecision(Protocol):
    """Trainers that choose the precision of the forward pass: `AMPMixin`."""

    mixed_precision: Precision | None


@runtime_checkable
class SupportsGradAccum(Protocol):
    """Trainers that take several batches per step: `GradAccumMixin`."""

    gradient_accumulation_steps: int


@runtime_checkable
class SupportsGradClip(Protocol):
    """Trainers that clip gradients: `GradClipMixin`."""

    max_grad_norm: float | None
    max_grad_value: float | None


@runtime_checkable
class SupportsLRScheduler(Protocol):
    """Trainers that schedule the learning rate: `LRSchedulerMixin`."""

    @property
    def scheduler(self) -> SchedulerLike:
        """The schedule of the current run."""
        ...


@runtime_checkable
class MetricLike(Protocol):
    """A metric: any `torchmetrics.Metric`, or an object with the same three methods."""

    def update(self, *args: Any, **kwargs: Any) -> object:
        """Update the metric with one batch."""
        ...

    def compute(self) -> Any:
        """Return the value over all batches since the last reset."""
        ...

    def reset(self) -> object:
        """Discard all batches."""
        ...


@runtime_checkable
class SupportsMetrics(Protocol):
    """Trainers that compute metrics: `MetricsMixin`."""

    @property
    def metrics(self) -> Mapping[str, MetricLike]:
        """The metrics of evaluations by name."""
        ...


@runtime_checkable
class SupportsCheckpoint(Protocol):
    """Trainers that save their runs: `CheckpointMixin`."""

    def save_checkpoint(self, path: str | PathLike[str] | None = None, *, label: str = "") -> str:
        """Save the run as soon as the current step is complete."""
        ...

    def load_checkpoint(
        self, path: str | PathLike[str], *, weights_only: bool = False, ignore: Collection[str] = ()
    ) -> None:
        """Load weights and the optimizer's state."""
        ...


@runtime_checkable
class SupportsSeed(Protocol):
    """Trainers with a seed: `SeedMixin`."""

    seed: int | None
    deterministic: bool


@runtime_checkable
class SupportsSWA(Protocol):
    """Trainers that end a run with averaged weights: `SWAMixin`."""

    swa_start: int | None


@runtime_checkable
class SupportsSyncBatchNorm(Protocol):
    """Trainers whose batch norm uses the batches of all processes: `SyncBatchNormMixin`."""

    sync_batch_norm: bool
