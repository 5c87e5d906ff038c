"""`TrainerBase`: the components of a trainer, and what is available outside of the loop."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from ptacc.composition.composable import Composable, hook
from ptacc.composition.roles import Role
from ptacc.console import write_line
from ptacc.core.callback import Callback
from ptacc.core.checks import check_callbacks, check_logged
from ptacc.data.batch import HostBatch
from ptacc.distributed.accelerator import AcceleratorBuilder, acquire_accelerator, is_current
from ptacc.distributed.gathering import gather_rows
from ptacc.distributed.process_group import Distributed, DistributedRuntime
from ptacc.errors import NestedRunError, NoRunError, OptionError
from ptacc.model.averaging import AveragedWeights
from ptacc.model.joined_modules import join_modules
from ptacc.model.option_modules import find_trained_options
from ptacc.run.history import RunHistory
from ptacc.run.history_file import HistoryFile
from ptacc.run.run import Run
from ptacc.tensors.structures import NestedT, concatenate, map_tensors, to_host
from ptacc.types.aliases import T
from ptacc.types.progress import Cadence, Progress, Steps
from ptacc.types.protocols import AcceleratorProtocol
from ptacc.validation import absolute_path

P = ParamSpec("P")


@dataclass
class TrainerState:
    """State of a trainer that changes between calls.

    Args:
        run: The current run, or the last one; None before the first.
        unwrapped_model: The user's model while `model` is the wrapped one, None otherwise.
        outside: The modules among the options that are trained with the model, by their places, during a run or an
            evaluation.
        runtime: The accelerator and the process group; None before their first use.
        num_runs: The number of runs started so far.
        averages: Averages of the weights outside of a run: those of the last run, or of a checkpoint loaded since.
        eval_batch: Batch of the evaluation or prediction in progress; None outside of its steps.
        is_streaming: Whether an iterator of `stream_predictions` is open.
    """

    run: Run | None = None
    unwrapped_model: nn.Module | None = None
    outside: Mapping[str, nn.Module] = field(default_factory=dict)
    runtime: tuple[AcceleratorProtocol, DistributedRuntime] | None = None
    num_runs: int = 0
    averages: dict[str, AveragedWeights] = field(default_factory=dict)
    eval_batch: HostBatch[Any] | None = None
    is_streaming: bool = False

    def mark_averages_current(self, model: nn.Module) -> None:
        """Record that the averages belong to the model's present weights."""
        for averages in self.averages.values():
            averages.mark_current(model)


class TrainerBase(Composable):
    """What every trainer has: the model and its optimizer, the device and the ranks, and the run.

    Options:
        model: The model, not wrapped, on any device. A run wraps it at its start and unwraps it at its end.
        optimizer: An optimizer of the model's parameters: one of torch's, or your own.
        callbacks: Callbacks in addition to the default ones.
        log_every: How often values are reported within an epoch: `Steps(n)`, `Minutes(n)`, `Items(n)` or None. They are
            also reported after each evaluation, and at the end of each epoch. See `Callback.on_values`.
        history_file: A new file for the history of the run, as JSON lines. Later runs of the same trainer write files
            with their number: `history-run-2.jsonl`.
    """

    _role: ClassVar[Role] = "core"

    if TYPE_CHECKING:  # the loop declares the option with the type of the user's model, which mixins need not know

        @property
        def model(self) -> nn.Module:
            """The model; within a run, the wrapped one."""
            raise NotImplementedError

    else:
        model: nn.Module = field(kw_only=False)
    optimizer: Optimizer
    callbacks: Sequence[Callback[Self]] = ()
    log_every: Cadence | None = Steps(50)
    history_file: str | os.PathLike[str] | None = None
    is_isolated: ClassVar[bool] = False
    """Whether this is a copy made by a search or an assertion. Mixins of a copy write no files and report nothing."""
    _state: TrainerState = field(init=False, default_factory=TrainerState)

    @override
    def check_options(self) -> None:
        owner = type(self).__name__
        if not isinstance(self.model, nn.Module):
            raise OptionError(f"{owner}(model={self.model!r}): must be an instance of torch.nn.Module.")
        if not isinstance(self.optimizer, Optimizer):
            raise OptionError(
                f"{owner}(optimizer={self.optimizer!r}): must be an instance of torch.optim.Optimizer, such as "
                "SGD(model.parameters(), lr=0.1)."
            )
        check_callbacks(owner, self.callbacks, Callback)
        if self.log_every is not None and not isinstance(self.log_every, Cadence):
            raise OptionError(f"{owner}(log_every={self.log_every!r}): must be a cadence, such as Steps(50), or None.")
        if self.history_file is not None:
            advice = "Remote stores cannot append lines to a file."
            self.history_file = absolute_path(owner, "history_file", self.history_file, advice)

    # ---- the model

    @property
    def unwrapped_model(self) -> nn.Module:
        """The model as you passed it; within a run, `model` is the wrapped one."""
        return self.model if self._state.unwrapped_model is None else self._state.unwrapped_model

    @property
    def trained_outside(self) -> Mapping[str, nn.Module]:
        """The modules among the options of which the optimizer has parameters, such as a loss, by their places."""
        is_known = self._state.unwrapped_model is not None
        return self._state.outside if is_known else find_trained_options(self, self.optimizer)

    @property
    def trained_modules(self) -> nn.Module:
        """The model, joined with the modules of `trained_outside`.

        It has their modules, parameters and buffers, by names such as `options.loss_func.weight`, and no `state_dict`.
        """
        return join_modules(self.unwrapped_model, self.trained_outside)

    def _set_model(self, model: nn.Module) -> None:
        """Set the option `model`, which is read-only for type checkers."""
        vars(self)["model"] = model

    def _averages(self, name: str) -> AveragedWeights | None:
        """Return the averages of the model's present weights by the name of their part, None if there are none.

        Warns:
            UserWarning: The weights were changed outside of a run, so that they are newer than their averages.
        """
        if self.is_running:
            return self.run.averages().get(name)
        averages = self._state.averages.get(name)
        if averages is None or averages.are_current(self.trained_modules):
            return averages
        warnings.warn(
            f"{type(self).__name__}: the weights were changed after the averages {name!r} were made. The present "
            "weights are used, and not the averages.",
            stacklevel=3,
        )
        return None

    def _check_weights_are_own(self, call: str) -> None:
        """Raise `NestedRunError` for a call that changes weights while the model has averages."""
        if any(averages.is_applied for averages in self._state.averages.values()):
            raise NestedRunError(
                f"{type(self).__name__}.{call} was called within averaged_weights(), which restores the weights at its "
                "end. Call it after that block."
            )

    # ---- the run

    @property
    def run(self) -> Run:
        """The state of the current run, or of the last one.

        Raises:
            NoRunError: `train()` has not been called.
        """
        if self._state.run is None:
            raise NoRunError(f"{type(self).__name__} has had no run yet: call train() first.")
        return self._state.run

    @property
    def has_run(self) -> bool:
        """Whether `train()` has been called, so that `run` exists."""
        return self._state.run is not None

    @property
    def is_running(self) -> bool:
        """Whether `train()` is being executed."""
        return self._state.run is not None and not self._state.run.is_over

    @property
    def progress(self) -> Progress:
        """The progress of the current run, or of the last one."""
        return self.run.progress

    @property
    def history(self) -> RunHistory:
        """The history of the current run, or of the last one."""
        return self.run.history

    def stop(self, reason: str) -> None:
        """Request the end of the run after the current step.

        All ranks end at the same step, and `history.stop_reason` is `reason`. A run that is resumed stays stopped,
        unless `resume_ignore` contains `"stop"`.
        """
        self.run.stopping.request(reason, self.run.progress, is_lasting=True)

    def log(self, values: Mapping[str, float | Tensor]) -> None:
        """Add values to the next report of the run, which callbacks and trackers receive in `on_values`.

        Call it in any hook or callback. The report has the mean of the values that were logged by a name since the last
        report, over all ranks that logged it. Tensors are not read before that. A mean over the items of a batch
        belongs in `StepOutput.logged` instead, which weighs the batches.

        Args:
            values: Scalars by name: numbers, or tensors with one element on any device.

        Raises:
            NoRunError: No run is in progress.
            OptionError: A value is not a scalar, or every run reports another value by its name.
        """
        if not self.is_running:
            raise NoRunError(f"{type(self).__name__}.log() was called outside of a run. Call it in a hook or callback.")
        check_logged(type(self).__name__, values)
        self.run.history.log(values)

    # ---- the device and the processes

    @property
    def accelerator(self) -> AcceleratorProtocol:
        """Accelerate's `Accelerator`, created at first use and shared by trainers with the same settings.

        A process has one at a time. The use of a trainer with other settings replaces it, and the next use of this one
        creates a new one, so do not keep it.
        """
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
        """The device of this rank."""
        return self.accelerator.device

    def print(self, *args: object) -> None:
        """Print once, on rank 0, above the progress bar."""
        if self._distributed.rank == 0:
            write_line(" ".join(map(str, args)), sys.stdout)

    def on_main_process(self, function: Callable[P, T]) -> Callable[P, T | None]:
        """Decorate a function so that it runs on rank 0 only; on other ranks it returns None."""

        @functools.wraps(function)
        def on_rank_0(*args: P.args, **kwargs: P.kwargs) -> T | None:
            return function(*args, **kwargs) if self._distributed.rank == 0 else None

        return on_rank_0

    @contextlib.contextmanager
    def main_process_first(self, *, local: bool = False) -> Generator[None]:
        """Run the block on rank 0 first and then on the other ranks, for example for a download that is cached.

        Args:
            local: Whether one rank of each host runs first, for files that hosts do not share.

        Raises:
            RankFailedError: The block failed on the rank that ran first.
            CollectiveError: Another rank did not make this call.
        """
        with self._distributed.main_first(local=local):
            yield

    def gather(self, values: NestedT) -> NestedT:
        """Concatenate the tensors of all ranks, in the order of ranks. Every rank receives the result.

        Args:
            values: A tensor or a nested structure of tensors, with the same structure on all ranks. First dimensions
                may differ between ranks, and may be 0.

        Returns:
            The same structure on this rank's device: tensors `(n, ...)` become `(sum of n over ranks, ...)`, and
            scalars become `(world_size,)`.

        Raises:
            DataError: A value is not a tensor, or tensors differ in more than the first dimension.
            CollectiveError: Another rank did not make this call.
        """
        self._distributed.sync("gather()")
        with self._distributed.propagate_failure("in gather()"):
            parts = self._distributed.gather(map_tensors(to_host, values))
        return concatenate(parts, self.device)

    def gather_with_grad(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Concatenate the rows of all ranks' batches, with gradients: for losses with negatives of all ranks.

        For use in a step, which calls it on all ranks, and whose loss depends on the result on all ranks. Return the
        mean loss over this rank's own rows, against all gathered rows; the mean over all rows has the same gradients.
        Then losses and gradients are those of one process with the batches of all ranks as its batch. Padding batches
        are left out. With gradient accumulation, the negatives are those of a single batch.

        Args:
            rows: `(n, ...)`, one row for each sample of the batch. `n` may differ between ranks.

        Returns:
            All rows `(sum of n over ranks, ...)`, in the order of ranks, and the indices `(n,)` of this rank's own rows
            among them: the targets of a contrastive loss. In a padding batch, whose loss does not count, they are 0.

        Raises:
            DataError: A tensor is a scalar, or the tensors differ in more than the first dimension.
        """
        batch = self._state.eval_batch
        if batch is None and self.is_running and self.run.batch is not None:
            batch = self.run.batch
            self.run.engine.stop_overlapping()
        return gather_rows(rows, self._distributed, is_padding=batch is not None and batch.is_padding)

    @hook("fold")
    def configure_accelerator(self, builder: AcceleratorBuilder) -> None:
        """Set arguments of the `Accelerator`. Fold: call `super()` first, then `builder.write(MyMixin, ...)`.

        Called once, when the accelerator is created. Two mixins that write the same argument are an error.
        """

    def _make_history_file(self, path: Path) -> HistoryFile:
        return HistoryFile(path)

    def _runtime(self) -> tuple[AcceleratorProtocol, DistributedRuntime]:
        if self._state.runtime is None or not is_current(self._state.runtime[0]):
            builder = AcceleratorBuilder()
            self.configure_accelerator(builder)
            self._state.runtime = acquire_accelerator(self, builder)
        return self._state.runtime
