"""`Components`: what every trainer has, and what its users may ask of it outside of the loop."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, ParamSpec, Self

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import TypeVar, override

from ptacc.composition.composable import Composable, hook
from ptacc.composition.roles import Role
from ptacc.core.callback import Callback
from ptacc.core.checks import check_callbacks
from ptacc.distributed.accelerator import AcceleratorBuilder, acquire_accelerator
from ptacc.distributed.process_group import Distributed, DistributedRuntime
from ptacc.errors import NoRunError, OptionError
from ptacc.run.history import RunHistory
from ptacc.run.run import Run
from ptacc.tensors.structures import NestedT, concatenate, map_tensors, to_host
from ptacc.types.progress import Progress
from ptacc.types.protocols import AcceleratorProtocol

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class TrainerState:
    """What a trainer has only at times.

    Args:
        run: The current run, or the last one.
        bare_model: The user's model, while a wrapped one stands in its place.
        runtime: The accelerator and the processes, once they were needed.
        process: The process that needed them; a fork of it needs its own.
        runs: How many runs were begun.
    """

    run: Run | None = None
    bare_model: nn.Module | None = None
    runtime: tuple[AcceleratorProtocol, DistributedRuntime] | None = None
    process: int = 0
    runs: int = 0


class Components(Composable):
    """What every trainer has: the model and its optimizer, the processes and their devices, and the run.

    Options:
        model: The bare model, on any device. A run wraps it, and unwraps it at its end.
        optimizer: An optimizer of the model's parameters, any of torch's or one's own.
        callbacks: Listeners, beside the default ones.
        history_file: Append the history of each run to this file as JSON lines.
    """

    _role: ClassVar[Role] = "core"

    model: nn.Module = field(kw_only=False)
    optimizer: Optimizer
    callbacks: Sequence[Callback[Self]] = ()
    history_file: str | Path | None = None
    _state: TrainerState = field(init=False, default_factory=TrainerState)

    @override
    def check_options(self) -> None:
        """Refuse components of the wrong kind."""
        owner = type(self).__name__
        if not isinstance(self.model, nn.Module):
            raise OptionError(f"{owner}(model={self.model!r}): must be an instance of torch.nn.Module.")
        if not isinstance(self.optimizer, Optimizer):
            raise OptionError(
                f"{owner}(optimizer={self.optimizer!r}): must be an instance, such as SGD(model.parameters(), lr=0.1)."
            )
        check_callbacks(owner, self.callbacks, Callback)
        if "://" in str(self.history_file):
            raise OptionError(
                f"{owner}(history_file={str(self.history_file)!r}): lines are appended to it, which no remote store "
                "can do. Give a local path."
            )

    # ---- the model

    @property
    def unwrapped_model(self) -> nn.Module:
        """The user's bare model; within a run, `model` is the wrapped one."""
        return self.model if self._state.bare_model is None else self._state.bare_model

    def _set_model(self, model: nn.Module) -> None:
        """Put `model` in the place of the option, which type checkers take for the user's own."""
        self.model = model

    # ---- the run

    @property
    def run(self) -> Run:
        """The state of the current run, or of the last one.

        Raises:
            NoRunError: `train()` was not called yet.
        """
        if self._state.run is None:
            raise NoRunError(f"{type(self).__name__} has had no run yet: call train() first.")
        return self._state.run

    @property
    def has_run(self) -> bool:
        """Whether `train()` was called, so that there is a `run`."""
        return self._state.run is not None

    @property
    def is_running(self) -> bool:
        """Whether a `train()` is under way."""
        return self._state.run is not None and not self._state.run.is_over

    @property
    def progress(self) -> Progress:
        """How far the current run is, or the last one got."""
        return self.run.progress

    @property
    def history(self) -> RunHistory:
        """What the current run reported, or the last one."""
        return self.run.history

    def stop(self, reason: str) -> None:
        """Ask for the end of the run after the current step.

        All processes agree on it, and end at the same step; `history.stop_reason` says why.
        """
        self.run.request_stop(reason)

    # ---- the device and the processes

    @property
    def accelerator(self) -> AcceleratorProtocol:
        """Accelerate's `Accelerator`, made at first use and shared by trainers that need the same."""
        return self._runtime()[0]

    @property
    def distributed(self) -> Distributed:
        """The ranks of this launch: `rank`, `world_size`, `is_main`, `sum`, `gather`, `broadcast`."""
        return self._distributed

    @property
    def _distributed(self) -> DistributedRuntime:
        return self._runtime()[1]

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.accelerator.device

    def print(self, *args: object) -> None:
        """Print once, on rank 0."""
        if self._distributed.rank == 0:
            print(*args)  # noqa: T201  # this is what it is for

    def on_main_process(self, function: Callable[P, T]) -> Callable[P, T | None]:
        """Decorate a function so that rank 0 alone runs it; on the others it returns None at once."""

        @functools.wraps(function)
        def on_rank_0(*args: P.args, **kwargs: P.kwargs) -> T | None:
            return function(*args, **kwargs) if self._distributed.rank == 0 else None

        return on_rank_0

    @contextlib.contextmanager
    def main_process_first(self, *, local: bool = False) -> Iterator[None]:
        """Let rank 0 go through the block before the others, who then find what it left: a download, a cache.

        Args:
            local: Whether each host has a first process of its own, for what hosts do not share.

        Raises:
            RankFailedError: The block failed on the first process.
            CollectiveError: Another process did not come here.
        """
        with self._distributed.main_first(local=local):
            yield

    def gather(self, values: NestedT) -> NestedT:
        """Put the processes' tensors together, in the order of the ranks, on every process.

        Args:
            values: A tensor, or any structure of tensors, of the same form on all processes. First dimensions may
                differ, and be 0.

        Returns:
            The same structure on the same device: of tensors `(n, ...)` one of `(sum of all n, ...)`, of scalars one
            of `(world size,)`.

        Raises:
            DataError: Something in it is no tensor, or tensors differ in more than the first dimension.
            CollectiveError: Another process did not come here.
        """
        self._distributed.sync("gather()")
        with self._distributed.propagate_failure("in gather()"):
            parts = self._distributed.gather(map_tensors(to_host, values))
        return concatenate(parts, self.device)

    @hook("fold")
    def configure_accelerator(self, builder: AcceleratorBuilder) -> None:
        """Write this mixin's settings of the accelerator: `super()` first, then `builder.write(MyMixin, ...)`."""

    def _runtime(self) -> tuple[AcceleratorProtocol, DistributedRuntime]:
        if self._state.runtime is None or self._state.process != os.getpid():
            builder = AcceleratorBuilder()
            self.configure_accelerator(builder)
            self._state.runtime, self._state.process = acquire_accelerator(self, builder), os.getpid()
        return self._state.runtime


def get_distributed_runtime(trainer: Components) -> DistributedRuntime:
    """Return what mixins reach as `self._distributed`, for functions outside of the trainer."""
    return trainer._distributed  # noqa: SLF001
