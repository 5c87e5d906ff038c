"""`TrainingLoop`: the training loop, specified by its pseudocode in the documentation."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Sized
from dataclasses import field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, cast, final, overload

from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import Unpack, override

from ptacc.callbacks.defaults import default_callbacks
from ptacc.composition.fields import property_option
from ptacc.composition.misnamed import suggest_argument
from ptacc.composition.roles import Role, is_mixin
from ptacc.console import messages_shown
from ptacc.core.callback import Callback, Events, overrides
from ptacc.core.checks import check_callbacks, check_model_class, check_not_wrapped, check_output
from ptacc.core.hooks import TrainerCore
from ptacc.core.messages import announce
from ptacc.data.dataloader_config import DEFAULT_BATCH_SIZE
from ptacc.data.loading import known_length
from ptacc.data.transfer import Transfer, make_transfer
from ptacc.distributed.failure import CoordinatedExit
from ptacc.distributed.signals import signal_handlers
from ptacc.errors import CompositionError, DataError, NestedRunError, OptionError
from ptacc.loop.closure import step_by_closure
from ptacc.loop.error_notes import note_step, noting_loading
from ptacc.loop.evaluation import AnyEval, EvalData, TrainData
from ptacc.loop.explain import Explanation, explain, options_html
from ptacc.loop.setup import RunSetup, forwards_counted
from ptacc.model.gradients import discard_gradients
from ptacc.model.modes import get_modes, start_training
from ptacc.run.history import RunHistory
from ptacc.run.run import Run
from ptacc.run.step_result import StepResult
from ptacc.run.window import ItemCounter, Window, make_windows
from ptacc.types.aliases import BatchT, Duration, ModelT, OutputT, RawT, SampleT, T
from ptacc.types.arguments import (
    LIMITS,
    EpochLimited,
    ItemLimited,
    OptionallyLimited,
    RunOptions,
    StepLimited,
    TimeLimited,
    TrainOptions,
    check_run_options,
)
from ptacc.types.outputs import EpochRecord, StepOutput
from ptacc.types.progress import Progress
from ptacc.types.protocols import HasForward, HasModel
from ptacc.validation import check_keywords


class TrainingLoop(RunSetup[BatchT, OutputT, SampleT], Generic[BatchT, OutputT, ModelT, SampleT]):
    """The training loop, generic in the types of batches and of a step's outputs.

    The third type argument is the class of the model, by default `nn.Module`: `TrainingLoop[Pair, Tensor, MyModel]`. It
    is the type of `self.model`, so that type checkers know its methods and submodules. Another model is an error.

    `TrainingLoop[BatchT, OutputT]` takes datasets whose samples are of type `BatchT`, which torch's default collate
    function often preserves. If the samples are of another type, it is the fourth argument:
    `TrainingLoop[Pair, Tensor, nn.Module, tuple[Tensor, int]]`.

    Options:
        default_callbacks: Callbacks that come before `callbacks`: a progress bar, printed metrics, and a stop at the
            first loss that is NaN or infinite. `default_callbacks=()` leaves them out.

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

    if TYPE_CHECKING:
        _model: ModelT = property_option(alias="model", kw_only=False)

        @property
        @override
        def model(self) -> ModelT: ...
        @property
        @override
        def unwrapped_model(self) -> ModelT: ...

    @property
    def forward(self: HasModel[HasForward[T]]) -> T:
        """The model, for calls with the types of its `forward`: `self.forward(x)` is `self.model(x)`.

        torch declares that calling any module returns `Any`, so `self.model(x)` has no type.
        """
        return cast(T, self.model)

    def _mixins_must_come_before_the_loop(self) -> object:
        """Exist for type checkers: see `Mixin`."""
        return None

    def _batch_types_must_match_the_loop(self, batch: BatchT, output: StepOutput[OutputT]) -> None:
        """Exist for type checkers: see `BatchMixin`."""

    @override
    def check_options(self) -> None:
        check_model_class(type(self), self.model)
        check_callbacks(type(self).__name__, self.default_callbacks, Callback)
        check_has_step(type(self))

    # ---- what to write, and what to override

    @override
    @abstractmethod
    def train_step(self, batch: BatchT) -> StepOutput[OutputT]:
        """Abstract hook: compute the loss and the outputs of one batch.

        The loss is a scalar, the mean over the batch's items, with its graph. Mixins may refine it with `super()`.
        """

    @override
    def eval_step(self, batch: BatchT) -> StepOutput[OutputT]:
        """Default hook: compute the loss and the outputs of one batch in evaluation, by default with `train_step`."""
        return self.train_step(batch)

    @override
    def all_callbacks(self) -> Sequence[Callback[Any]]:
        return (*self.default_callbacks, *self.callbacks)

    # ---- what to call. Data with a length is limited by epochs, steps, items or time; a stream by the last three

    @overload
    def train(
        self, train_dataset: TrainData[SampleT], eval_dataset: AnyEval[SampleT] = ..., **options: Unpack[EpochLimited]
    ) -> RunHistory: ...
    @overload
    def train(
        self,
        train_dataset: TrainData[RawT],
        eval_dataset: AnyEval[RawT] = ...,
        *,
        collate_fn: Callable[[list[RawT]], BatchT | None] | None,
        **options: Unpack[EpochLimited],
    ) -> RunHistory: ...
    @overload
    def train(
        self, train_dataset: EvalData[SampleT], eval_dataset: AnyEval[SampleT] = ..., **options: Unpack[StepLimited]
    ) -> RunHistory: ...
    @overload
    def train(
        self,
        train_dataset: EvalData[RawT],
        eval_dataset: AnyEval[RawT] = ...,
        *,
        collate_fn: Callable[[list[RawT]], BatchT | None] | None,
        **options: Unpack[StepLimited],
    ) -> RunHistory: ...
    @overload
    def train(
        self, train_dataset: EvalData[SampleT], eval_dataset: AnyEval[SampleT] = ..., **options: Unpack[ItemLimited]
    ) -> RunHistory: ...
    @overload
    def train(
        self,
        train_dataset: EvalData[RawT],
        eval_dataset: AnyEval[RawT] = ...,
        *,
        collate_fn: Callable[[list[RawT]], BatchT | None] | None,
        **options: Unpack[ItemLimited],
    ) -> RunHistory: ...
    @overload
    def train(
        self, train_dataset: EvalData[SampleT], eval_dataset: AnyEval[SampleT] = ..., **options: Unpack[TimeLimited]
    ) -> RunHistory: ...
    @overload
    def train(
        self,
        train_dataset: EvalData[RawT],
        eval_dataset: AnyEval[RawT] = ...,
        *,
        collate_fn: Callable[[list[RawT]], BatchT | None] | None,
        **options: Unpack[TimeLimited],
    ) -> RunHistory: ...
    @overload
    def train(
        self,
        train_dataset: EvalData[SampleT],
        eval_dataset: AnyEval[SampleT] = ...,
        **options: Unpack[OptionallyLimited],
    ) -> RunHistory: ...
    @overload
    def train(
        self,
        train_dataset: EvalData[RawT],
        eval_dataset: AnyEval[RawT] = ...,
        *,
        collate_fn: Callable[[list[RawT]], BatchT | None] | None,
        **options: Unpack[OptionallyLimited],
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
        max_items: float | None = None,
        max_time: Duration | None = None,
        **options: Unpack[TrainOptions],
    ) -> RunHistory:
        """Train on a dataset, and evaluate on another.

        Args:
            train_dataset: A dataset, map-style or iterable, or a DataLoader.
            eval_dataset: A dataset or DataLoader, or several of them by name. Default: no evaluation.
            collate_fn: Makes a batch of a list of samples, or returns None to leave them out. Default: torch's
                `default_collate`.
            num_epochs: Largest number of passes over the data.
            max_steps: Largest number of optimizer steps.
            max_items: Number of items, over all processes. The run ends after the step that reaches it. Items are what
                `count_items` counts: by default the samples, or the tokens whose target the loss does not ignore.
            max_time: Longest duration, in seconds or as a `timedelta`. The run ends after the step that reaches it.
            options: See `TrainOptions`.

        Returns:
            The history of the run, which ends at the first limit that is reached. `stop_reason` names it if it was
            `max_time`, or another reason for which the run was stopped, and is otherwise unset.

        Raises:
            OptionError: A count below 1, or no limit at all.
            DataError: The training data is empty, not a dataset, or does not match its length.
            ModelError: A model or optimizer that cannot be trained as given.
            LossError: The first step's loss cannot be minimised.
            NestedRunError: This is called within a run of the same trainer.
            RankFailedError: Another process of the launch failed, or was killed.
            SystemExit: A process was asked to terminate. All processes stop after the same step, and exit with 128 plus
                the signal's number: 143 for SIGTERM.
        """
        with self._distributed.synced("train()"):
            self._check_not_running()
            check_not_wrapped(type(self).__name__, self.model)
            known = {*TrainOptions.__annotations__, *LIMITS}
            check_keywords("train()", options, known, suggest_argument(options.keys() - known, type(self)))
            run_options = RunOptions(
                num_epochs=num_epochs,
                max_steps=max_steps,
                max_items=max_items,
                max_time=max_time,
                collate_fn=collate_fn,
                **options,
            )
            check_run_options(run_options)
        with messages_shown(), self._wrapped_model() as before, self._reserved():
            run = self._state.run = self._make_run(train_dataset, eval_dataset, run_options)
            self._state.averages = {}
            try:
                self._set_model(run.model)
                start_training(self.model, before.modes)
                for module in self._state.outside.values():
                    start_training(module, get_modes(module))
                failures = run.distributed.propagate_failure(lambda: f"after step {run.progress.steps}")
                handlers = signal_handlers(self.stop_signals(), run.stopping.request_termination)
                with failures, handlers, forwards_counted(run):
                    with contextlib.suppress(CoordinatedExit):  # raised by an evaluation that a hook called
                        self._loop(run)
                    run.stopping.apply_pending_signal()
                run.history.end(run.progress.steps, run.elapsed)
            except BaseException as error:
                run.history.end(run.progress.steps, run.elapsed, error)
                self._events().exception(error)
                raise
            finally:
                run.close()
                self._state.averages = run.averages()
                self._state.mark_averages_current(self.trained_modules)
                run.distributed.count_progress()
        if run.stopping.exit_code is not None:
            raise SystemExit(run.stopping.exit_code)
        return run.history

    def explain(
        self,
        train_dataset: Sized | None = None,
        *,
        num_epochs: int | None = None,
        max_steps: int | None = None,
        per_device_batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> Explanation:
        """Describe what this trainer will do, as tables to print: options, batches, layers, memory and more.

        Args:
            train_dataset: The data, for the number of steps. A loader has its own batch size.
            num_epochs: As for `train`.
            max_steps: As for `train`.
            per_device_batch_size: As for `train`.
        """
        samples = known_length(train_dataset)
        if isinstance(train_dataset, DataLoader):
            if train_dataset.batch_size is None:
                raise OptionError(
                    f"{type(self).__name__}.explain() got a loader without a batch size: the samples of its steps are "
                    "unknown. Give the dataset, with per_device_batch_size."
                )
            is_stream = isinstance(train_dataset.dataset, IterableDataset)
            samples = known_length(train_dataset.dataset if is_stream else train_dataset.sampler)
            per_device_batch_size = train_dataset.batch_size
        with self._frozen_as_in_run():
            return explain(self, samples, per_device_batch_size, num_epochs, max_steps, self._shard_counts())

    def _repr_html_(self) -> str:
        return options_html(self)

    def _check_not_running(self) -> None:
        if self._state.unwrapped_model is not None:
            raise NestedRunError(
                f"{type(self).__name__}.train() was called within its own run, or within an evaluation or prediction. "
                "Call it after that has ended, or make a second trainer."
            )
        self._check_weights_are_own("train()")

    # ---- the loop

    def _loop(self, run: Run) -> None:
        """Run the loop, as its pseudocode in the documentation specifies."""
        events, transfer = self._events(), make_transfer(run.device)
        around_step = self.around_step if overrides(self, TrainerCore, "around_step") else contextlib.nullcontext
        take_step = partial(step_by_closure, self._compute_gradients) if self.steps_by_closure else self._step
        with self.around_run(), run.optimizer_modes.training(), self._saving_on_exception(run):
            events.run_start()
            self._start_or_resume(run, events)
            discard_gradients(self.trained_modules)  # of the user's own code, or of a step that was interrupted
            while run.is_within_epoch or not run.is_done():
                run.begin_epoch()
                with self.around_epoch():
                    events.epoch_start()
                    if run.is_within_epoch:  # resumed within it
                        self.load_run_state()
                        self._after_step(run, events)
                    for window in self._windows(run):
                        run.is_consistent = False
                        try:
                            events.step_start()
                            with around_step():
                                step, was_updated = take_step(run, window, transfer)
                            run.count_window(window, step, happened=was_updated)
                            if was_updated:
                                events.step_end(step)
                        except Exception as error:
                            note_step(self, error, run, window)
                            raise
                        self._after_step(run, events)
                    record = self._end_epoch(run)
                events.epoch_end(record)
                self._after_epoch(run, events, record)
                if run.is_within_epoch:  # the run ends within it
                    break
            if text := describe_finished_run(run):
                announce(self, f"{type(self).__name__}.train(): {text}")
            elif run.history.stop_reason is not None:
                announce(self, f"stopped after step {run.progress.steps:,}: {run.history.stop_reason}")
            run.optimizer_modes.finish()
            events.run_end()
            run.engine.release()

    def _step(self, run: Run, window: Window[BatchT], transfer: Transfer) -> tuple[StepResult, bool]:
        """Take one optimizer step over the batches of a window. Return whether a gradient scaler did not skip it."""
        step = run.begin_step(window)
        self._compute_gradients(run, window, transfer, step)
        return step, run.engine.update()

    def _compute_gradients(
        self, run: Run, window: Window[BatchT], transfer: Transfer, step: StepResult, *, is_repeated: bool = False
    ) -> None:
        """Compute the gradients of a step, and call `on_gradients_ready`. If repeated, `on_batch_end` is not called."""
        retains_outputs = run.retains_outputs and not is_repeated
        for index, host in enumerate(window.batches):
            run.batch = host
            with run.engine.around_batch(is_last=index == len(window.batches) - 1):
                batch = transfer.to_device(host.data)
                output = self.train_step(batch)
                check_output(type(self).__name__, output, run.device)
                loss, logged = window.scale_loss(index, output), output.logged
                retained = output if retains_outputs and not host.is_padding else None
                del output  # unless it is retained, the backward pass can use its memory
                run.distributed.count_progress()
                self.backward(loss)
            step.add(loss.detach(), logged, window.weight(index))
            if retained is not None:
                self.on_batch_end(batch, retained)
            del batch, retained, loss  # the next forward pass needs their memory
        run.batch = None
        run.engine.unscale_gradients()
        self.on_gradients_ready(step)

    def _windows(self, run: Run) -> Iterator[Window[BatchT]]:
        """Iterate over the remaining windows of an epoch."""
        if run.is_within_epoch and run.is_epoch_complete:
            run.data.set_epoch(run.progress.epochs)  # the evaluation that was interrupted may share the data
            return
        with noting_loading(self, run):
            counter = ItemCounter(self.count_items, self._items_are_samples)
            sizes = run.accumulation.sizes_from(run.progress)
            windows = make_windows(run.read_epoch(), sizes, counter, run.distributed)
            while not run.is_done():
                window = next(windows, None)
                run.epoch.is_exhausted = window is None
                if window is None:
                    return
                if not window.batches:
                    run.skip_window(window)
                    continue
                if run.progress.steps == 0:
                    self.check_batch(window.batches[0].data)
                yield window

    # ---- between steps and epochs: evaluate, agree on stopping, save

    def _start_or_resume(self, run: Run, events: Events) -> None:
        if run.resume_state is not None:
            self.load_run_state()
            run.is_consistent = True
            if not run.is_within_epoch:
                run.stopping.agree(run.progress, self.should_stop())
        run.leave_out_setup()
        is_new = not run.is_within_epoch and not run.progress.epochs and not run.history.initial
        if run.options.get("evaluate_first", False) and is_new:
            run.is_consistent = True
            if self._evaluate_sets(run):
                run.history.initial.update(run.epoch.evaluations)
                self._report(run, events)
            self.save_run_state()

    def _after_step(self, run: Run, events: Events) -> None:
        run.is_consistent = True
        was_evaluated = run.is_due(run.evaluate_every, run.evaluated_at) and self._evaluate_sets(run)
        run.stopping.poll(run.progress, self.should_stop())
        if not run.is_epoch_complete:  # else after the epoch
            is_done = run.is_done()
            was_evaluated |= is_done and run.should_evaluate_at_end and self._evaluate_sets(run)
            is_due = is_done or (self.log_every is not None and run.is_due(self.log_every, run.reported_at))
            if was_evaluated or (is_due and run.has_unreported_steps):
                self._report(run, events)
            self.save_run_state()

    def _end_epoch(self, run: Run) -> EpochRecord:
        number, before = run.progress.epochs + 1, run.progress
        if run.is_epoch_complete:
            if run.is_epoch_empty:
                raise DataError(
                    "The training data gave no batch in a whole epoch. Check what the dataset yields, and that "
                    "collate_fn ends in `return batch`."
                )
            run.complete_epoch()
            is_due = run.should_evaluate_at_end or run.is_due(run.evaluate_every, run.evaluated_at)
            if is_due and not self._evaluate_sets(run):
                run.reopen_epoch(before)
                self.save_run_state()
        run.is_consistent = False
        run.history.read_steps(run.distributed)
        record = run.make_epoch_record(number, self.compute_train_metrics())
        self._check_train_monitors(record)
        run.history.add_epoch(record)
        return record

    def _after_epoch(self, run: Run, events: Events, record: EpochRecord) -> None:
        if run.epoch.is_counted:
            self._report(run, events, record.train_metrics)
        run.stopping.agree(run.progress, self.should_stop())
        if run.epoch.is_counted:
            run.is_consistent = True
            self.save_run_state()

    def _report(self, run: Run, events: Events, train_metrics: Mapping[str, float] | None = None) -> None:
        """Report values: what was logged since the last report, and what was evaluated at this step. A collective."""
        run.is_consistent = False
        record = run.make_report(train_metrics or {})
        if record.values.keys() > {"epoch"}:
            run.history.add_values(record)
            events.values(record.values, record.step)
        run.reported_at = replace(run.progress, seconds=run.elapsed)
        run.is_consistent = True

    def _evaluate_sets(self, run: Run) -> bool:
        """Evaluate every set. Return False if a termination signal interrupted that: the results are discarded."""
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
        run.complete_evaluation()
        self._check_evaluated_monitors(run)
        return True

    @contextlib.contextmanager
    def _saving_on_exception(self, run: Run) -> Generator[None]:
        """Save a single-process run when an exception ends it between steps. Other processes would be elsewhere."""
        try:
            yield
        except BaseException as error:
            if run.is_consistent and run.distributed.is_single_process and not isinstance(error, CoordinatedExit):
                self.save_on_exception(error)
            raise


def check_has_step(trainer: type) -> None:
    """Raise `CompositionError` if only mixins define `train_step`: Python takes it for implemented."""
    if TrainingLoop is next(base for base in trainer.__mro__ if "train_step" in vars(base) and not is_mixin(base)):
        raise CompositionError(
            f"{trainer.__name__}: its mixins refine train_step, and no class defines one. Define `train_step(self, "
            "batch)` in a class behind them."
        )


def describe_finished_run(run: Run) -> str:
    """Describe why a resumed run has made no step and no evaluation; empty if it has made one."""
    saved, reason = run.resume_state, run.history.stop_reason
    if saved is None or run.stopping.exit_code is not None:
        return ""
    if (run.progress.steps, run.evaluated_at) != (saved.progress.steps, Progress(**saved.shared["evaluated_at"])):
        return ""
    if reason is None:
        what, advice = "is complete", "To train more, pass a larger num_epochs, max_steps or max_items."
    elif run.stopping.is_lasting:
        what, advice = f"was stopped ({reason})", "To continue it, pass resume_ignore={'stop'}."
    else:
        what, advice = f"stops again ({reason})", "To continue it, change what stops it."
    return (
        f"the run {what} after {run.progress.steps:,} steps, so nothing was trained. {advice} To start a new run, give "
        "it a checkpoint_dir of its own."
    )
