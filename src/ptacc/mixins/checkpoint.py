"""Checkpoints."""

from __future__ import annotations

import atexit
import contextlib
import signal
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

from typing_extensions import override

from ptacc.checkpoint.load import check_export, export_to, load_into, states_to_export
from ptacc.checkpoint.manager import CheckpointManager, OnError
from ptacc.checkpoint.parts import Part, check_storable
from ptacc.checkpoint.resume import CheckpointRef, Resumption, find
from ptacc.checkpoint.retention import Retention
from ptacc.checkpoint.run_saver import RunSaver
from ptacc.checkpoint.storage.paths import make_absolute, parse_path, path_or_url
from ptacc.checkpoint.storage.remote_store import open_store
from ptacc.checkpoint.storage.store import CheckpointStore
from ptacc.checkpoint.trainer_state import check_goes_on, own_parts, put_back, shared_parts
from ptacc.core.hooks import Mixin
from ptacc.errors import CheckpointError, NestedRunError, OptionError
from ptacc.run.history import StepResult
from ptacc.run.state import ResumeState, StateKey
from ptacc.types.monitor import Best, Monitor
from ptacc.types.progress import Cadence, Epochs, Minutes, Steps
from ptacc.validation import check_at_least

SAVER: StateKey[RunSaver] = StateKey("checkpoints")
KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "checkpoint_dir": ((str, Path), "a path"),
    "checkpoint_every": ((Steps, Epochs, Minutes, NoneType), "a cadence: Steps(500), Epochs(1), Minutes(10), or None"),
    "resume": ((bool, str, Path), "True, False, or the path of a checkpoint"),
    "keep_best": ((Best, NoneType), 'Best("eval_loss"), or None'),
    "checkpoint_key": ((bytes, NoneType), "bytes"),
}
COLLECTIONS: Mapping[str, tuple[type, str]] = {
    "resume_ignore": (str, "names: {'batch_size'}"),
    "checkpoint_signals": (signal.Signals, "signals: (signal.SIGTERM,)"),
}


class CheckpointMixin(Mixin):
    """Saves a run so that it can be killed at any moment, and goes on as if it had not been.

    A checkpoint is a directory, there whole or not at all. It holds all that a run is made of: weights, optimizer,
    schedule, averages, random streams of every process, the place in the data, history, and the state of each mixin
    and callback that is `Stateful`. Loading one runs no code. A run is saved between steps; what falls on the last
    step of an epoch is saved with the epoch's evaluation in it.

    Options:
        checkpoint_dir: A directory for the run, on a disk that all hosts share, or its URL for fsspec:
            `"s3://bucket/runs/x"`. Later runs of the same trainer have their own in it: `run-2`, `run-3`.
        checkpoint_every: `Epochs(1)`, `Steps(500)` or `Minutes(10)`; None for none but the last. Every run is saved at
            its end.
        resume: True to go on from the newest checkpoint that is whole, or to start afresh where there is none; or the
            path or URL of one, for the first run of the trainer.
        resume_ignore: Names of differences to go on despite of, and of parts that may be missing.
        keep_last: How many of the newest to keep.
        keep_best: Which of the best to keep: `Best("accuracy", mode="max")`.
        keep_every: Keep those whose step is a multiple of this. What any of the three keeps is kept; without one, all.
        checkpoint_in_background: Write beside the steps, which wait for a copy of the state only.
        checkpoint_signals: At which signals to save and end, with 128 and the signal's number as the exit code.
        checkpoint_on_exception: Whether to save a run of one process that an exception ends between two steps.
        checkpoint_errors: `"raise"`, or `"warn"` to go on where a checkpoint cannot be saved, on a full disk.
        checkpoint_allows_non_finite: Whether to save weights that hold NaN or infinity.
        checkpoint_key: Signs checkpoints (HMAC), and refuses those that are not signed with it.

    Hooks: `find_resume_state`, `load_run_state`, `save_run_state`, `save_on_exception`, `stop_signals`,
    `around_run`, `on_run_start`, `on_step_end`, `on_run_end`, `monitors`.

    Combines with: everything.

    Example:
        >>> from ptacc import CheckpointMixin, Steps, Trainer
        >>> class MyTrainer(CheckpointMixin, Trainer):
        ...     checkpoint_every = Steps(500)
        ...     keep_last = 3
    """

    checkpoint_dir: str | Path
    checkpoint_every: Cadence | None = field(default_factory=lambda: Epochs(1))
    resume: bool | str | Path = False
    resume_ignore: Collection[str] = ()
    keep_last: int | None = None
    keep_best: Best | None = None
    keep_every: int | None = None
    checkpoint_in_background: bool = False
    checkpoint_signals: Collection[signal.Signals] = (signal.SIGTERM, signal.SIGINT)
    checkpoint_on_exception: bool = True
    checkpoint_errors: Literal["raise", "warn"] = "raise"
    checkpoint_allows_non_finite: bool = False
    checkpoint_key: bytes | None = field(default=None, repr=False)
    _resumption: Resumption | None = field(init=False, default=None)

    @override
    def check_options(self) -> None:
        """Refuse what is no cadence, a count below 1, and what is none of the choices."""
        owner = type(self).__name__
        for name in ("keep_last", "keep_every"):
            if (count := getattr(self, name)) is not None:
                check_at_least(owner, name, count, 1)
        for name, (kinds, advice) in KINDS.items():
            if not isinstance(value := getattr(self, name), kinds):
                raise OptionError(f"{owner}({name}={value!r}): must be {advice}.")
            if isinstance(value, str | Path):
                check_place(owner, name, value)
        for name, (kind, advice) in COLLECTIONS.items():
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(part, kind) for part in value):
                raise OptionError(f"{owner}({name}={value!r}): must be {advice}.")
        if self.checkpoint_errors not in get_args(OnError):
            raise OptionError(f'{owner}(checkpoint_errors={self.checkpoint_errors!r}): must be "raise" or "warn".')

    # ---- what to call

    def save_checkpoint(self, path: str | Path | None = None, *, label: str = "") -> str | Path:
        """Have the run saved as soon as the present step is done, and its evaluation if there is one. All processes.

        Args:
            path: Where to, or its URL; among the run's checkpoints, named by its step, if not given.
            label: What it is saved for: the newest checkpoint of each label is always kept.

        Returns:
            Where it will be: a `Path`, or the URL as a string.

        Raises:
            NestedRunError: No run is under way: a run saves itself at its end.
            CollectiveError: Another process did not call this.
        """
        if not self.is_running:
            raise NestedRunError(
                f"{type(self).__name__}.save_checkpoint() is for within a run, from a callback or a hook: a run saves "
                "itself at its end. export_model() writes the weights alone."
            )
        self._distributed.sync("save_checkpoint()")
        return path_or_url(self.run[SAVER].ask(None if path is None else parse_path(path), label))

    def load_checkpoint(self, path: str | Path, *, weights_only: bool = False) -> None:
        """Load weights and the optimizer's state, for evaluating, or for a new run to start from. All processes.

        To go on with the run that was saved, give `resume=path` to the trainer.

        Args:
            path: A checkpoint, or a directory of them for the newest; or the URL of one.
            weights_only: Whether to leave the optimizer as it is.

        Raises:
            CheckpointError: There is none, or it is of another model; the message has each difference.
            DamagedCheckpointError: It is not what was written.
            NestedRunError: A run is under way.
        """
        if self.is_running:
            raise NestedRunError(f"{type(self).__name__}.load_checkpoint() within a run. Load before it.")
        with self._distributed.synced("load_checkpoint()"):
            loaded = load_into(self, parse_path(path), self.checkpoint_key, weights_only=weights_only)
        self._events().load(path_or_url(loaded))

    def export_model(self, path: str | Path, *, averages: str | None = None, overwrite: bool = False) -> None:
        """Write the weights to a safetensors file that `model.load_state_dict` takes, each tensor under its name.

        Args:
            path: Where to, or its URL.
            averages: `"ema"` or `"swa"` for the averages of the last run in their place.
            overwrite: Whether to replace a file that is there.

        Raises:
            CheckpointError: There is a file already, or no such averages.
        """
        target = parse_path(path)
        with self._distributed.synced("export_model()"):
            if self.distributed.rank == 0:
                check_export(target, overwrite=overwrite)
        states = states_to_export(self, averages)
        with self._distributed.synced("the writing of export_model()"):
            if self.distributed.rank == 0:
                export_to(target, states, averages, overwrite=overwrite)

    # ---- going on

    @override
    def find_resume_state(self) -> ResumeState | None:
        """Find the checkpoint to go on from, on rank 0 for all, and read this process's part of it."""
        found = self.distributed.broadcast(self._find() if self.distributed.rank == 0 else None)
        self._resumption = None
        if found is None:
            return super().find_resume_state()
        store = open_store(found.directory, self.checkpoint_key)
        self._resumption = Resumption.read(store, found.name, self.distributed.rank, self.distributed.world_size)
        return self._resumption.saved_run(with_file="history" not in self.resume_ignore)

    def _find(self) -> CheckpointRef | None:
        is_first = self._state.runs == 1
        return find(self._store(), self.resume if is_first or isinstance(self.resume, bool) else False)

    def _store(self) -> CheckpointStore:
        directory = make_absolute(parse_path(self.checkpoint_dir))
        number = self._state.runs
        return open_store(directory if number == 1 else f"{directory}/run-{number}", self.checkpoint_key)

    @override
    def on_run_start(self) -> None:
        """Open the run's line of checkpoints."""
        super().on_run_start()
        best = self.keep_best
        of_best = (None, None) if best is None else (best.count, best.monitored)
        retention = Retention(self.keep_last, of_best[0], self.keep_every, of_best[1])
        in_background = self.checkpoint_in_background
        line = CheckpointManager(
            self._store(), self._distributed, retention, self.checkpoint_errors, in_background=in_background
        )
        line.open(self._resumption)
        events = self._events()
        signals, non_finite = self.checkpoint_signals, self.checkpoint_allows_non_finite
        self.run[SAVER] = RunSaver(
            self, line, self.checkpoint_every, signals, non_finite, lambda path: events.save(path_or_url(path))
        )

    @override
    def load_run_state(self) -> None:
        """Put everything back, after it was compared with what is here."""
        super().load_run_state()
        if self._resumption is None:
            return
        check_goes_on(self, self._resumption.shared, self._resumption.own, self.resume_ignore)
        saved = self._resumption = self._resumption.revived(self.run.engine)
        put_back(self, saved.shared, saved.own, self.resume_ignore)
        if self.run.is_consistent or not self.run.is_within_epoch:  # for the last time
            self._resumption = None
            if saved.manifest.world_size != self.distributed.world_size:
                warnings.warn(
                    f"The run goes on with {self.distributed.world_size} processes, and was saved with "
                    f"{saved.manifest.world_size}: sums come out equal but for rounding, and random draws differ.",
                    stacklevel=2,
                )
            self._events().load(path_or_url(saved.path))

    # ---- saving

    @override
    def save_run_state(self) -> None:
        """Save the run, if that is due."""
        super().save_run_state()
        self.run[SAVER].save_if_due()

    @override
    def save_on_exception(self, error: BaseException) -> None:
        """Save the run before it ends by an exception."""
        super().save_on_exception(error)
        if self.checkpoint_on_exception and SAVER in self.run and not isinstance(error, CheckpointError):
            self.run[SAVER].save_on_exception()

    @override
    def on_epoch_start(self) -> None:
        """Check that everything can be saved, before it has to be."""
        super().on_epoch_start()
        if not self.progress.steps:
            check_storable([*shared_parts(self), *own_parts(self)])

    @override
    def on_step_end(self, step: StepResult) -> None:
        """Check what the optimizer keeps from its first step on."""
        super().on_step_end(step)
        if step.step == 1:
            check_storable(Part(slot.name, slot.optimizer.state_dict()) for slot in self.run.engine.slots)

    @override
    def on_run_end(self) -> None:
        """Wait for the last checkpoint."""
        self.run[SAVER].finish()
        super().on_run_end()

    @override
    @contextlib.contextmanager
    def around_run(self) -> Iterator[None]:
        """Let a checkpoint that is under way end, also after an exception."""
        with super().around_run():
            try:
                yield
            finally:
                if SAVER in self.run:
                    self.run[SAVER].line.abandon()

    @override
    def stop_signals(self) -> frozenset[signal.Signals]:
        """Heed the signals at which to save."""
        return super().stop_signals() | frozenset(self.checkpoint_signals)

    @override
    def monitors(self) -> tuple[tuple[object, Monitor], ...]:
        """Watch the value by which some are best."""
        mine = () if self.keep_best is None else ((self, self.keep_best.monitored),)
        return (*super().monitors(), *mine)

    @override
    @classmethod
    def law_options(cls) -> Mapping[str, Any]:
        """Return a directory that is removed when the process ends."""
        directory = tempfile.TemporaryDirectory(prefix="ptacc-")
        atexit.register(directory.cleanup)
        return {"checkpoint_dir": directory.name}


def check_place(owner: str, name: str, value: str | Path) -> None:
    """Raise `OptionError` for an option that is a URL of no file system, or of one that is not installed."""
    try:
        parse_path(value)
    except OptionError as error:
        raise OptionError(f"{owner}({name}={value!r}): {error}") from error
