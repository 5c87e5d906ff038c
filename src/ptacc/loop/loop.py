"""`TrainingLoop`: the loop. Its pseudocode stands in the documentation and is the specification."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import field
from typing import Any, ClassVar, Generic, Self, final, overload

from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import Unpack, override

from ptacc.callbacks import default_callbacks
from ptacc.composition.composable import hook
from ptacc.composition.roles import Role
from ptacc.core.batch_hooks import BatchHooks
from ptacc.core.callback import Callback, overrides
from ptacc.core.checks import check_bare, check_callbacks, check_output
from ptacc.data.dataloader_config import DEFAULT_BATCH_SIZE
from ptacc.data.transfer import Transfer, transfer_to
from ptacc.distributed.failure import CoordinatedExit
from ptacc.distributed.signals import signal_handlers
from ptacc.errors import DataError, NestedRunError
from ptacc.loop.evaluation import EvalData, EvalSets
from ptacc.loop.explain import Explanation, explain
from ptacc.loop.setup import RunSetUp, marking_forwards
from ptacc.run.history import RunHistory, StepResult
from ptacc.run.run import Run
from ptacc.run.window import Window, make_windows
from ptacc.types.aliases import BatchT, Duration, OutputT, RawT, SampleT
from ptacc.types.arguments import RunOptions, TrainOptions
from ptacc.types.outputs import EpochRecord, StepOutput
from ptacc.types.protocols import SizedDataset
from ptacc.validation import check_keywords


class TrainingLoop(RunSetUp[BatchT, OutputT, SampleT], Generic[BatchT, OutputT, SampleT]):
    """The core loop, generic in the batch and in what a step puts out.

    `TrainingLoop[BatchT, OutputT]` takes datasets of `BatchT`, as the default collate function keeps a sample's type.
    Where it does not, a third argument names the samples: `TrainingLoop[Pair, Tensor, tuple[Tensor, int]]`.

    Options:
        default_callbacks: A progress bar, printed metrics and a stop at the first loss that is no number, in front of
            `callbacks`. `default_callbacks=()` leaves them out.

    Example:
        >>> import torch
        >>> from torch import Tensor, nn
        >>> from ptacc import StepOutput, TrainingLoop
        >>> class Autoencoder(TrainingLoop[Tensor, Tensor]):
        ...     def train_step(self, batch: Tensor) -> StepOutput[Tensor]:
        ...         decoded = self.model(batch)
        ...         return StepOutput(loss=(decoded - batch).square().mean(), outputs=decoded)
        >>> net = nn.Linear(4, 4)
        >>> trainer = Autoencoder(net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), default_callbacks=())
        >>> history = trainer.train(list(torch.ones(32, 4)), num_epochs=2)
        >>> len(history), history[-1].step
        (2, 8)
    """

    _role: ClassVar[Role] = "loop"

    default_callbacks: Sequence[Callback[Self]] = field(default_factory=default_callbacks)

    def _mixins_stand_before_the_loop(self) -> object:
        """Exist for type checkers: see `Mixin`."""
        return None

    def _takes_the_batches_of_the_loop(self, batch: BatchT, output: StepOutput[OutputT]) -> None:
        """Exist for type checkers: see `BatchMixin`."""

    @override
    def check_options(self) -> None:
        """Refuse default callbacks that are none."""
        check_callbacks(type(self).__name__, self.default_callbacks, Callback)

    # ---- what to write, and what to override

    @abstractmethod
    def train_step(self, batch: BatchT) -> StepOutput[OutputT]:
        """Compute the loss and the outputs of one batch: a scalar, the mean over the batch's items, with its graph."""

    @override
    def eval_step(self, batch: BatchT) -> StepOutput[OutputT]:
        """Compute the loss and the outputs of one batch: by default as `train_step` does."""
        return self.train_step(batch)

    @hook("default")
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a batch's loss, which is scaled to its share of the step."""
        self.run.engine.backward(loss)

    @override
    def all_callbacks(self) -> Sequence[Callback[Any]]:
        """Return the callbacks of a run, the default ones first."""
        return (*self.default_callbacks, *self.callbacks)

    # ---- what to call: sized data ends by epochs, steps or time; a stream by steps or time

    @overload
    def train(
        self,
        train_dataset: SizedDataset[SampleT] | DataLoader[object],
        eval_dataset: EvalData[SampleT] | EvalSets[SampleT] | None = None,
        *,
        num_epochs: int,
        max_steps: int | None = None,
        max_time: Duration | None = None,
        **options: Unpack[TrainOptions],
    ) -> RunHistory: ...
    @overload
    def train(
        self,
        train_dataset: SizedDataset[RawT] | DataLoader[object],
        eval_dataset: EvalData[RawT] | EvalSets[RawT] | None = None,
        *,
        collate_fn: Callable[[list[RawT]], BatchT],
        num_epochs: int,
        max_steps: int | None = None,
        max_time: Duration | None = None,
        **options: Unpack[TrainOptions],
    ) -> RunHistory: ...
    @overload
    def train(
        self,
        train_dataset: EvalData[SampleT],
        eval_dataset: EvalData[SampleT] | EvalSets[SampleT] | None = None,
        *,
        num_epochs: int | None = None,
        max_steps: int,
        max_time: Duration | None = None,
        **options: Unpack[TrainOptions],
    ) -> RunHistory: ...
    @overload
    def train(
        self,
        train_dataset: EvalData[RawT],
        eval_dataset: EvalData[RawT] | EvalSets[RawT] | None = None,
        *,
        collate_fn: Callable[[list[RawT]], BatchT],
        num_epochs: int | None = None,
        max_steps: int,
        max_time: Duration | None = None,
        **options: Unpack[TrainOptions],
    ) -> RunHistory: ...
    @overload
    def train(
        self,
        train_dataset: EvalData[SampleT],
        eval_dataset: EvalData[SampleT] | EvalSets[SampleT] | None = None,
        *,
        num_epochs: int | None = None,
        max_steps: int | None = None,
        max_time: Duration,
        **options: Unpack[TrainOptions],
    ) -> RunHistory: ...
    @overload
    def train(
        self,
        train_dataset: EvalData[RawT],
        eval_dataset: EvalData[RawT] | EvalSets[RawT] | None = None,
        *,
        collate_fn: Callable[[list[RawT]], BatchT],
        num_epochs: int | None = None,
        max_steps: int | None = None,
        max_time: Duration,
        **options: Unpack[TrainOptions],
    ) -> RunHistory: ...
    @final
    def train(
        self,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_epochs: int | None = None,
        max_steps: int | None = None,
        max_time: Duration | None = None,
        **options: Unpack[TrainOptions],
    ) -> RunHistory:
        """Train on a dataset, and evaluate on another.

        Args:
            train_dataset: A dataset, map-style or iterable, or a DataLoader.
            eval_dataset: Likewise, or several of them by name.
            collate_fn: Makes a batch of a list of samples; torch's own if not given.
            num_epochs: Passes over the data at most.
            max_steps: Optimizer steps at most.
            max_time: Seconds at most, or a `timedelta`.
            options: See `TrainOptions`.

        Returns:
            The history of the run. Whichever limit comes first ended it; `stop_reason` says if it was the clock, or
            something else than these limits.

        Raises:
            OptionError: A count below 1, or no limit at all.
            DataError: No data, an empty dataset, or one that is not what it says.
            ModelError: A model or optimizer that cannot be trained as given.
            LossError: The first step's loss cannot be minimised.
            NestedRunError: This is called within a run of the same trainer.
            RankFailedError: Another process of the launch failed, or was killed.
            SystemExit: A process was asked to terminate: all stopped at one step, and exit with 128 and the signal's
                number, 143 for SIGTERM.
        """
        with self._distributed.synced("train()"):
            self._check_not_running()
            check_bare(type(self).__name__, self.model)
            check_keywords("train()", options, {*TrainOptions.__annotations__, "num_epochs", "max_steps", "max_time"})
            asked = RunOptions(num_epochs, max_steps, max_time, collate_fn, **options)
        with self._wrapped_model():
            run = self._state.run = self._make_run(train_dataset, eval_dataset, asked)
            try:
                self._set_model(run.model)
                self.model.train()
                together = run.distributed.propagate_failure(lambda: f"after step {run.progress.steps}")
                heeded = signal_handlers(self.stop_signals(), run.request_termination)
                with together, heeded, marking_forwards(run):
                    with contextlib.suppress(CoordinatedExit):  # from an evaluation that a hook asked for
                        self._loop(run)
                    run.apply_pending_signal()
            except BaseException as error:
                self._events().exception(error)
                raise
            finally:
                run.is_over = True
                run.distributed.count_progress()
        if run.exit_code is not None:
            raise SystemExit(run.exit_code)
        return run.history

    def explain(
        self,
        train_dataset: Sized | None = None,
        *,
        num_epochs: int | None = None,
        max_steps: int | None = None,
        per_device_batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> Explanation:
        """Tell what this trainer will do, as tables to `print`: classes, hooks, options, launch, batches, state.

        Args:
            train_dataset: The data, for the number of steps.
            num_epochs: As for `train`.
            max_steps: As for `train`.
            per_device_batch_size: As for `train`.
        """
        samples = None if train_dataset is None else len(train_dataset)
        return explain(self, samples, per_device_batch_size, (num_epochs, max_steps))

    def _check_not_running(self) -> None:
        if self._state.bare_model is not None:
            raise NestedRunError(
                f"{type(self).__name__}.train() was called within its own run, or within an evaluation or prediction. "
                "Call it after that has ended, or make a second trainer."
            )

    # ---- the loop

    def _loop(self, run: Run) -> None:
        """Go through a run, as the pseudocode has it."""
        tell, around_step, transfer = self._events(), self._context("around_step"), transfer_to(run.device)
        with self.around_run(), self._rescuing(run):
            tell.run_start()
            self._enter(run)
            while run.is_within_epoch or not run.is_done():
                run.begin_epoch()
                with self.around_epoch():
                    tell.epoch_start()
                    if run.is_within_epoch:  # it goes on from a checkpoint
                        self.load_run_state()
                        self._between_steps(run)
                    for window in self._windows(run):
                        run.is_consistent = False
                        tell.step_start()
                        with around_step():
                            step, happened = self._step(run, window, transfer)
                        run.count_window(window, step, happened=happened)
                        if happened:
                            tell.step_end(step)
                        self._between_steps(run)
                    record = self._end_epoch(run)
                tell.epoch_end(record)
                self._between_epochs(run)
                if run.is_within_epoch:  # the end came there
                    break
            run.engine.sync_buffers()
            tell.run_end()
            run.engine.release()

    def _enter(self, run: Run) -> None:
        """Come to the first step, or to where a saved run goes on."""
        if run.resume_state is not None:
            self.load_run_state()
            run.is_consistent = True
            if not run.is_within_epoch:
                run.agree_to_stop(self.should_stop(), at_epoch_end=True)
        is_new = not run.is_within_epoch and not run.progress.epochs and not run.history.initial
        if run.options.evaluate_first and is_new:
            run.is_consistent = True
            if self._evaluate_sets(run):
                run.history.initial.update(run.epoch.evaluations)
            self.save_run_state()

    def _step(self, run: Run, window: Window[BatchT], transfer: Transfer) -> tuple[StepResult, bool]:
        """Take one optimizer step over the batches of a window. Say whether it happened: a scaler may skip it."""
        run.distributed.count_progress()
        number, epoch = run.progress.steps + 1, run.progress.epochs + 1
        step = StepResult(number, epoch, window.total, run.engine.slots[0].learning_rate)
        is_heard = run.distributed.is_replica_leader and overrides(self, BatchHooks, "on_batch_end")
        for index, host in enumerate(window.batches):
            run.batch = host
            with run.engine.batch_of_step(is_last=index == len(window.batches) - 1):
                batch = transfer.bring(host.data)
                output = self.train_step(batch)
                check_output(type(self).__name__, output, run.device)
                loss, logged = window.scale_loss(index, output), output.logged
                heard = output if is_heard and not host.is_padding else None
                del output  # where nobody hears of it, the backward pass can have its memory
                run.distributed.count_progress()
                self.backward(loss)
            step.add(loss.detach(), logged, window.weight(index))
            if heard is not None:
                self.on_batch_end(batch, heard)
            del batch, heard, loss  # the next forward pass needs their memory
        run.batch = None
        run.engine.unscale_gradients()
        self.on_gradients_ready(step)
        return step, run.engine.update()

    def _windows(self, run: Run) -> Iterator[Window[BatchT]]:
        """Iterate over the windows that are left of an epoch."""
        if run.is_within_epoch and run.is_epoch_complete:
            return
        batches = run.data.epoch(run.progress.epochs, run.progress.offset)
        items_are_samples = not overrides(self, BatchHooks, "count_items")
        windows = make_windows(
            batches, run.accumulation_steps, self.count_items, run.distributed, items_are_samples=items_are_samples
        )
        while not run.is_done():
            if (window := next(windows, None)) is None:
                run.epoch.is_exhausted = True
                return
            if run.progress.steps == 0:
                self.check_batch(window.batches[0].data)
            yield window

    def _between_steps(self, run: Run) -> None:
        """Evaluate where it is time to, agree on the end, and let the run be saved: with the epoch's end at its end."""
        run.is_consistent = True
        if run.is_due(run.options.evaluate_every, run.evaluated_at):
            self._evaluate_sets(run)
        run.agree_to_stop(self.should_stop())
        if not run.is_epoch_complete:
            if run.should_evaluate_at_end:
                self._evaluate_sets(run)
            self.save_run_state()

    def _end_epoch(self, run: Run) -> EpochRecord:
        """Count the epoch, evaluate where it is time to, and put its record together."""
        number, within = run.progress.epochs + 1, run.progress
        if run.is_epoch_complete:
            if not run.is_within_epoch:
                raise DataError("The training data gave no batch in a whole epoch. Check what the dataset yields.")
            run.complete_epoch()
            is_due = run.should_evaluate_at_end or run.is_due(run.options.evaluate_every, run.evaluated_at)
            if is_due and not self._evaluate_sets(run):
                run.reopen_epoch(within)
                self.save_run_state()
        run.is_consistent = False
        run.history.read_steps(run.distributed)
        record = run.make_epoch_record(number, self.compute_train_metrics())
        run.history.add_epoch(record)
        return record

    def _between_epochs(self, run: Run) -> None:
        """Agree on the end, and let the run be saved."""
        run.agree_to_stop(self.should_stop(), at_epoch_end=True)
        if run.epoch.is_counted:
            run.is_consistent = True
            self.save_run_state()

    def _evaluate_sets(self, run: Run) -> bool:
        """Evaluate every set. Return False where that was broken off, to end the run: nothing of it is kept then."""
        run.is_scheduled_evaluation = True
        try:
            for name, source in run.eval_data.items():
                if name not in run.partial_evaluation:
                    run.partial_evaluation[name] = self._evaluate(name, source)
                    run.is_consistent = True
        except CoordinatedExit:
            return False
        finally:
            run.is_scheduled_evaluation = False
        run.epoch.evaluations |= run.partial_evaluation
        run.evaluated_at, run.partial_evaluation = run.progress, {}
        return True

    @contextlib.contextmanager
    def _rescuing(self, run: Run) -> Iterator[None]:
        """Let a run be saved that ends by an exception between two steps: other processes would be elsewhere."""
        try:
            yield
        except BaseException as error:
            if run.is_consistent and run.distributed.is_single_process and not isinstance(error, CoordinatedExit):
                self.save_on_exception(error)
            raise
