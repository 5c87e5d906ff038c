"""Checkpoints."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Collection, Generator
from dataclasses import field
from os import PathLike
from pathlib import Path
from typing import Literal

from typing_extensions import override

from ptacc.checkpoint.export import export_weights
from ptacc.checkpoint.load import find_which, load_into
from ptacc.checkpoint.manager import CheckpointManager
from ptacc.checkpoint.options import absolute_location, check_values
from ptacc.checkpoint.resume import Resumption, choose_checkpoint
from ptacc.checkpoint.retention import Retention
from ptacc.checkpoint.run_saver import RunSaver
from ptacc.checkpoint.trainer_state import check_first_states, check_states, fingerprint_start, restore_run
from ptacc.core.hooks import Mixin
from ptacc.core.messages import announce
from ptacc.core.monitoring import epoch_values, evaluated_values
from ptacc.errors import CheckpointError, NestedRunError
from ptacc.files.paths import parse_absolute
from ptacc.run.history_file import HistoryFile
from ptacc.run.state import ResumeState, StateKey
from ptacc.run.step_result import StepResult
from ptacc.storage.lock import DirectoryLock
from ptacc.storage.remote_store import open_sibling, open_store
from ptacc.storage.store import CheckpointStore
from ptacc.types.monitor import Best, Monitor
from ptacc.types.outputs import EpochRecord, EvalResult
from ptacc.types.progress import Cadence, Epochs

SAVER: StateKey[RunSaver] = StateKey("checkpoints")


class CheckpointMixin(Mixin):
    """Saves checkpoints, from which a run resumes as if it had not been interrupted.

    A checkpoint is a directory that is written atomically. It contains the complete state of the run: weights,
    optimizer, scheduler, averages, random states of all ranks, position in the data, history, and the state of each
    mixin and callback that is `Stateful`. Loading it executes no code. Checkpoints are written between steps; one that
    is due at the last step of an epoch is written after the evaluation at the epoch's end.

    Options:
        checkpoint_dir: Directory for the checkpoints of the run, on a file system that all hosts share, or its URL for
            fsspec: `"s3://bucket/runs/x"`. Later runs of the same trainer use `run-2`, `run-3`, ... in it.
        checkpoint_every: `Epochs(1)`, `Steps(500)`, `Minutes(10)` or `Items(10_000)`; None to save at the end of the
            run only. Every run is saved at its end.
        resume: True to resume from the newest intact checkpoint, if there is one; or the path or URL of a checkpoint,
            for the first run of the trainer.
        resume_ignore: Names of differences to ignore when resuming, and of parts that the checkpoint may lack, or
            patterns: `"model.head.*"`. An error lists the names; the guide says what happens to each. `"stop"`
            continues a run that `trainer.stop()` has stopped.
        keep_last: Number of newest checkpoints to keep.
        keep_best: Best checkpoints to keep, such as `Best("accuracy", mode="max")`. The run is also saved after each
            evaluation that is among the best, with the weights that were evaluated.
        keep_every: Keep checkpoints whose step is a multiple of this. A checkpoint is kept if any of the three options
            keeps it. Without any of them, all are kept.
        checkpoint_in_background: Whether to write files in a background thread. Steps wait only while the state is
            copied to host memory.
        checkpoint_signals: Signals at which the run is saved and stopped, with exit code 128 plus the signal number.
        checkpoint_on_exception: Whether to save a single-process run when an exception ends it between two steps.
        checkpoint_errors: What to do if a checkpoint cannot be saved, as on a full disk: `"raise"`, or `"warn"` and
            continue.
        checkpoint_allows_non_finite: Whether to save weights with NaN or infinity.
        checkpoint_frozen: Whether to save frozen parameters. If not, a run resumes with those of the model that it is
            given, which have to be the same.
        checkpoint_key: Key to sign checkpoints with (HMAC). Checkpoints without a valid signature are then refused.

    Hooks: `find_resume_state`, `load_run_state`, `save_run_state`, `save_on_exception`, `stop_signals`,
    `around_run`, `on_run_start`, `on_epoch_start`, `on_step_end`, `on_evaluation_end`, `on_epoch_end`, `on_run_end`,
    `monitors`.

    Combines with: everything.

    Example:
        >>> from ptacc import CheckpointMixin, Steps, Trainer
        >>> class MyTrainer(CheckpointMixin, Trainer):
        ...     checkpoint_every = Steps(500)
        ...     keep_last = 3
    """

    checkpoint_dir: str | PathLike[str]
    checkpoint_every: Cadence | None = field(default_factory=lambda: Epochs(1))
    resume: bool | str | PathLike[str] = False
    resume_ignore: Collection[str] = ()
    keep_last: int | None = None
    keep_best: Best | None = None
    keep_every: int | None = None
    checkpoint_in_background: bool = False
    checkpoint_signals: Collection[signal.Signals] = (signal.SIGTERM, signal.SIGINT)
    checkpoint_on_exception: bool = True
    checkpoint_errors: Literal["raise", "warn"] = "raise"
    checkpoint_allows_non_finite: bool = False
    checkpoint_frozen: bool = True
    checkpoint_key: bytes | None = field(default=None, repr=False)
    _resumption: Resumption | None = field(init=False, default=None)
    _lock: DirectoryLock = field(init=False)

    @override
    def check_options(self) -> None:
        check_values(self)
        self.checkpoint_dir = absolute_location(self, "checkpoint_dir")
        if not isinstance(self.resume, bool):
            self.resume = absolute_location(self, "resume")

    def save_checkpoint(self, path: str | PathLike[str] | None = None, *, label: str = "") -> str:
        """Request a checkpoint. It is saved after the current step and the evaluation that is due at it. A collective.

        Args:
            path: Path or URL of the checkpoint; by default one in `checkpoint_dir`, named by its step.
            label: A name for its purpose. The newest checkpoint of each label is always kept.

        Returns:
            The path or URL where it will be.

        Raises:
            NestedRunError: It was called outside of a run. Every run is saved at its end.
            CollectiveError: Another rank did not call this.
        """
        if not self.is_running:
            raise NestedRunError(
                f"{type(self).__name__}.save_checkpoint() must be called during a run, from a callback or a hook. "
                "Every run is saved at its end. export_model() writes the weights alone."
            )
        self._distributed.sync("save_checkpoint()")
        return self.run[SAVER].request(None if path is None else parse_absolute(path), label)

    def load_checkpoint(
        self,
        path: str | PathLike[str],
        *,
        which: str | Monitor | Best = "last",
        weights_only: bool = False,
        ignore: Collection[str] = (),
    ) -> None:
        """Load the weights and the optimizer state of a checkpoint, to evaluate or to start a new run. A collective.

        Averages of the weights are loaded with them, so that `evaluate` returns what the saved run reported. A new run
        starts new averages. The optimizer's settings, such as the learning rate, are those from before the schedule of
        the saved run. To resume the saved run instead, pass `resume=path` to the trainer.

        Args:
            path: Path or URL of a checkpoint, or of a directory of checkpoints.
            which: Which checkpoint of a directory: `"last"`, the newest; `"best"`, the best by the value of
                `keep_best`; a label, for the newest with this label; or `Best("accuracy", mode="max")`, for the best
                by another value. Damaged ones are skipped.
            weights_only: Whether to leave the optimizer unchanged.
            ignore: Names of tensors that keep the model's own values, or patterns: `"model.head.*"`. The optimizer
                keeps its own states of them. The model or the checkpoint may lack them.

        Raises:
            CheckpointError: No checkpoint is found, or it is of another model; the message lists each difference.
            OptionError: A pattern in `ignore` matches nothing, or the value of the best checkpoint is unknown.
            DamagedCheckpointError: A file of the checkpoint was changed or is missing.
            NestedRunError: It was called during a run, or within `averaged_weights()`.
        """
        if self.is_running:
            raise NestedRunError(f"{type(self).__name__}.load_checkpoint() was called during a run. Call it before.")
        self._check_weights_are_own("load_checkpoint()")
        chosen, key = find_which(type(self).__name__, which, self.keep_best), self.checkpoint_key
        loaded, self._state.averages = load_into(
            self, self._distributed, path, key, which=chosen, weights_only=weights_only, ignore=ignore
        )
        self._state.mark_averages_current(self.trained_modules)
        self._events().load(loaded)

    def export_model(
        self,
        path: str | PathLike[str],
        *,
        averages: str | None = None,
        overwrite: bool = False,
        trainable_only: bool = False,
    ) -> None:
        """Write the model's `state_dict()` to a safetensors file. A collective.

        Args:
            path: Path or URL of the file.
            averages: `"ema"` or `"swa"` to write the averages of the weights instead: of the last run, or of a
                checkpoint that was loaded after it.
            overwrite: Whether to replace an existing file.
            trainable_only: Whether to write only the parameters that are trained, such as those of an adapter.

        Raises:
            CheckpointError: The file exists, there are no such averages, or no parameter is trained.
        """
        found = {} if averages is None else {averages: self._averages(averages)}
        export_weights(self, self._distributed, path, found, overwrite=overwrite, trainable_only=trainable_only)

    # ---- resuming

    @override
    @contextlib.contextmanager
    def _reserved(self) -> Generator[None]:
        """Hold the lock of `checkpoint_dir`, on rank 0, since it is one run that all ranks save."""
        with contextlib.ExitStack() as stack:
            with self._distributed.synced("the set-up of checkpoints"):
                self._lock = DirectoryLock(open_sibling(self._store(), parse_absolute(self.checkpoint_dir)))
                if self.distributed.rank == 0 and not self.is_isolated:
                    stack.enter_context(self._lock.held())
            stack.enter_context(super()._reserved())
            yield

    @override
    def find_resume_state(self) -> ResumeState | None:
        resume = self.resume if self._state.num_runs == 1 or isinstance(self.resume, bool) else False
        found = choose_checkpoint(self._store(), resume) if self.distributed.rank == 0 else None
        found, self._resumption = self.distributed.broadcast(found), None
        if found is None:
            return super().find_resume_state()
        self._resumption = Resumption.read(found, self.checkpoint_key, self.distributed)
        return self._resumption.resume_state(self.resume_ignore)

    @override
    def _make_history_file(self, path: Path) -> HistoryFile:
        return HistoryFile(path, self._store().directory, may_start_over=self.resume is True)

    def _store(self) -> CheckpointStore:
        directory, number = parse_absolute(self.checkpoint_dir), self._state.num_runs
        return open_store(directory if number == 1 else f"{directory}/run-{number}", self.checkpoint_key)

    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        retention = Retention(self.keep_last, self.keep_best, self.keep_every)
        errors, in_background = self.checkpoint_errors, self.checkpoint_in_background
        manager = CheckpointManager(self._store(), self._distributed, retention, self._lock, errors, in_background)
        if not self.is_isolated:
            manager.open(self._resumption)
        on_saved, signals, non_finite = self._events().save, self.checkpoint_signals, self.checkpoint_allows_non_finite
        at_start = None if self.checkpoint_frozen or self.is_isolated else fingerprint_start(self)
        self.run[SAVER] = RunSaver(self, manager, self.checkpoint_every, signals, non_finite, on_saved, at_start)

    @override
    def load_run_state(self) -> None:
        super().load_run_state()
        if (saved := self._resumption) is not None and restore_run(self, saved, self.resume_ignore):
            self._resumption = None
            announce(self, f"resumed from step {self.progress.steps:,} ({saved.path})")
            self._events().load(saved.path)

    # ---- saving

    @override
    def save_run_state(self) -> None:
        super().save_run_state()
        self.run[SAVER].save_if_due()

    @override
    def save_on_exception(self, error: BaseException) -> None:
        super().save_on_exception(error)
        if self.checkpoint_on_exception and SAVER in self.run and not isinstance(error, CheckpointError):
            self.run[SAVER].save_on_exception()

    @override
    def on_epoch_start(self) -> None:
        super().on_epoch_start()
        if not self.progress.steps:  # a run that cannot be saved fails at its start
            check_states(self)

    @override
    def on_step_end(self, step: StepResult) -> None:
        super().on_step_end(step)
        if step.step == 1:  # optimizers and metrics have a state from here on
            check_first_states(self)

    @override
    def on_evaluation_end(self, name: str, result: EvalResult) -> None:
        super().on_evaluation_end(name, result)
        if values := evaluated_values(self, name, result):
            self.run[SAVER].observe(values)

    @override
    def on_epoch_end(self, record: EpochRecord) -> None:
        super().on_epoch_end(record)
        if record.is_complete:  # a run that ends within an epoch has been saved
            self.run[SAVER].observe(epoch_values(record))

    @override
    def on_run_end(self) -> None:
        self.run[SAVER].finish()
        super().on_run_end()

    @override
    @contextlib.contextmanager
    def around_run(self) -> Generator[None]:
        with super().around_run():
            try:
                yield
            finally:
                if SAVER in self.run:
                    self.run[SAVER].manager.abandon()

    @override
    def stop_signals(self) -> frozenset[signal.Signals]:
        return super().stop_signals() | frozenset(self.checkpoint_signals)

    @override
    def monitors(self) -> tuple[tuple[object, Monitor], ...]:
        own = () if self.keep_best is None else ((self, self.keep_best.resolved_monitor),)
        return (*super().monitors(), *own)
