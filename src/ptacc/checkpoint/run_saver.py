"""Saving a run: when it is due, whether it is fit to be saved, and what is told of it."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from ptacc.checkpoint.manager import CheckpointManager
from ptacc.checkpoint.storage.manifest import Manifest
from ptacc.checkpoint.trainer_state import parts_to_save
from ptacc.core.hooks import TrainerCore
from ptacc.types.progress import Cadence
from ptacc.types.protocols import StateDict


@dataclass
class RunSaver:
    """Saves a trainer's run to a line of checkpoints.

    Args:
        trainer: Within its run.
        line: Where to.
        every: How often, None for the end alone.
        signals: At which to save and end.
        saves_non_finite: Whether weights that are no numbers are saved.
        tell: Called with the path of each checkpoint that was made.
    """

    trainer: TrainerCore
    line: CheckpointManager
    every: Cadence | None
    signals: Collection[signal.Signals]
    saves_non_finite: bool
    tell: Callable[[str], None]
    _asked: list[tuple[str | None, str]] = field(default_factory=list)

    def ask(self, path: str | None, label: str) -> str:
        """Ask for a checkpoint as soon as the run can be saved; return where it will be. A collective."""
        self._asked.append((path, label))
        store, distributed, steps = self.line.store, self.trainer.distributed, self.trainer.progress.steps
        return path or store.locate(distributed.broadcast(store.free_name(steps) if distributed.rank == 0 else ""))

    def save_if_due(self) -> None:
        """Save the run if it is time to, or if somebody asked for it. A collective, between two steps or epochs."""
        self.line.check()
        run = self.trainer.run
        if not (self._asked or self._is_due()):
            return
        if run.exit_code is None and run.is_within_epoch:
            run.agree_to_stop(self.trainer.should_stop(), at_boundary=True)  # a vote of before may be under way
        self.save()

    def save(self) -> None:
        """Save the run, unless its weights are no numbers."""
        asked, self._asked = self._asked or [(None, "")], []
        run = self.trainer.run
        run.history.read_steps(run.distributed)
        for path, label in asked:
            self._save(path, label)

    def finish(self) -> None:
        """Wait for a checkpoint that is under way, and tell of it. A collective."""
        if (path := self.line.finish()) is not None:
            self.tell(path)

    def save_on_exception(self) -> None:
        """Save the run before an exception ends it, whatever has become of the checkpoint before.

        That exception is the one to raise; what goes wrong here is a warning.
        """
        for act in (self.finish, self.save, self.finish):
            try:
                act()
            except Exception as failure:  # noqa: BLE001
                warnings.warn(f"The run could not be saved either: {failure}", stacklevel=2)

    def _is_due(self) -> bool:
        run, last = self.trainer.run, self.line.saved_at
        now = run.progress
        if (now.steps, now.epochs, now.batches) == (last.steps, last.epochs, last.batches):
            return False
        if run.exit_code is not None:
            return run.exit_code - 128 in self.signals
        return run.is_done() or (self.every is not None and run.is_due(self.every, last))

    def _save(self, path: str | None, label: str) -> None:
        self.finish()
        now, before = self.trainer.progress, self.line.saved_at
        if path is None:
            self.line.saved_at = now  # as the checkpoint itself has it
        shared, mine, versions = parts_to_save(self.trainer)
        manifest = Manifest(
            name="",
            run=self.line.identity,
            step=now.steps,
            epoch=now.epochs,
            offset=now.offset,
            world_size=self.trainer.distributed.world_size,
            label=label,
            parts=versions,
            metrics=self.trainer.run.fresh_values(),
        )
        weights = () if self.saves_non_finite else tuple(self.trainer.run.engine.held_parameters())
        saved = self.line.begin(now, manifest, shared, mine, path, weights)
        if saved is not None:
            self.tell(saved)
        elif not self.line.is_saving:
            self.line.saved_at = before

    # ---- what a checkpoint holds of it

    def state_dict(self) -> StateDict:
        """Return the state of the line."""
        return self.line.state_dict()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Go on with the line of a saved run."""
        self.line.load_state_dict(state_dict)
