"""Protocols: what users hand us, what Accelerate gives us, and what each mixin adds.

Functions and callbacks ask for a protocol, never for a mixin: `Callback[SupportsMetrics]` fits any trainer that has
metrics, whoever wrote them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import TypeVar

from ptacc.types.aliases import Precision
from ptacc.types.progress import RunPlan

T_co = TypeVar("T_co", covariant=True)

StateDict: TypeAlias = dict[str, Any]
"""What torch's own objects call a state dict; its values are theirs."""


# ---- what users hand us


class SizedDataset(Protocol[T_co]):
    """A map-style dataset: a length, and one sample for each index."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, index: int, /) -> T_co:
        """Return one sample."""
        ...


@runtime_checkable
class Stateful(Protocol):
    """Something whose state a checkpoint holds."""

    def state_dict(self) -> StateDict:
        """Return the state as numbers, strings, tensors and containers of them."""
        ...

    def load_state_dict(self, state_dict: StateDict, /) -> object:
        """Take over a state that `state_dict` returned."""
        ...


class LRSchedulerLike(Protocol):
    """A learning-rate schedule: every torch scheduler, and one's own with the same three methods."""

    def step(self) -> object:
        """Move on by one step, or by one epoch."""
        ...

    def state_dict(self) -> StateDict:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: StateDict, /) -> object:
        """Take over a state."""
        ...


class PlateauSchedulerLike(Protocol):
    """A schedule that follows a value, as torch's `ReduceLROnPlateau` does."""

    def step(self, metrics: float, /) -> object:
        """Move on, given the value at the end of an evaluation."""
        ...

    def state_dict(self) -> StateDict:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: StateDict, /) -> object:
        """Take over a state."""
        ...


SchedulerFactory: TypeAlias = Callable[[Optimizer, RunPlan], LRSchedulerLike | PlateauSchedulerLike]


class ParallelStyleLike(Protocol):
    """A `ParallelStyle` of torch: how a layer is split over processes."""

    src_data_rank: int | None


# ---- what Accelerate gives us


class AcceleratorProtocol(Protocol):
    """The part of `accelerate.Accelerator` that trainers and their users call, typed.

    Accelerate ships no types of its own; this protocol is what `trainer.accelerator` is seen as, and the project's
    stubs prove that the real class conforms to it.
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
        """The gradient scaler, where the precision needs one."""
        ...

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Move a model to the device and wrap it for the processes and the precision."""
        ...

    def unwrap_model(
        self, model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True
    ) -> nn.Module:
        """Take the wrappers off a model."""
        ...

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Keep gradients from being averaged over the processes, for a batch that is not the step's last."""
        ...

    def autocast(self) -> AbstractContextManager[None]:
        """Run the block in the forward pass's precision."""
        ...

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate tensors of equal shape over the processes along the first dimension."""
        ...

    def reduce(self, tensor: Tensor, reduction: str = "sum", scale: float = 1.0) -> Tensor:
        """Sum or average a tensor over the processes."""
        ...

    def wait_for_everyone(self) -> None:
        """Wait until every process is here."""
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
    """Trainers that take several batches a step: `GradAccumMixin`."""

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
    def scheduler(self) -> LRSchedulerLike | PlateauSchedulerLike:
        """The schedule of the current run."""
        ...


class MetricLike(Protocol):
    """A metric: every `torchmetrics.Metric`, and one's own with the same four methods."""

    def update(self, *args: Any, **kwargs: Any) -> object:
        """Take in one batch."""
        ...

    def compute(self) -> Any:
        """Return the value over everything taken in."""
        ...

    def reset(self) -> object:
        """Forget everything taken in."""
        ...


@runtime_checkable
class SupportsMetrics(Protocol):
    """Trainers that compute metrics: `MetricsMixin`."""

    @property
    def metrics(self) -> Mapping[str, MetricLike]:
        """The metrics of evaluations, by name."""
        ...


@runtime_checkable
class SupportsCheckpoint(Protocol):
    """Trainers that save their runs: `CheckpointMixin`."""

    def save_checkpoint(self, path: str | Path | None = None, *, label: str = "") -> str | Path:
        """Have the run saved as soon as the present step is done."""
        ...

    def load_checkpoint(self, path: str | Path, *, weights_only: bool = False) -> None:
        """Load weights and the optimizer's state."""
        ...


@runtime_checkable
class SupportsSeed(Protocol):
    """Trainers with a seed of their own: `SeedMixin`."""

    seed: int | None
    deterministic: bool


@runtime_checkable
class SupportsSWA(Protocol):
    """Trainers that end with an average of weights: `SWAMixin`."""

    swa_start: int | None


@runtime_checkable
class SupportsSyncBatchNorm(Protocol):
    """Trainers whose batch norm sees the batches of all processes: `SyncBatchNormMixin`."""

    sync_batch_norm: bool
