"""Saving a run: when a checkpoint is due, and what it contains."""

from __future__ import annotations

import functools
import logging
import math
import signal
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field

from torch import Tensor

from ptacc.checkpoint.frozen import Fingerprints, leave_out_frozen
from ptacc.checkpoint.manager import CheckpointManager
from ptacc.checkpoint.parts import MODEL
from ptacc.checkpoint.retention import add_if_best
from ptacc.checkpoint.trainer_state import collect_parts, move_shards
from ptacc.core.hooks import TrainerCore
from ptacc.core.messages import announce
from ptacc.model.state_dict import canonical_name, first_non_finite, is_placeholder
from ptacc.run.environment import get_versions
from ptacc.storage.manifest import Manifest
from ptacc.tensors.dtensor import to_local
from ptacc.types.progress import Cadence, Progress
from ptacc.types.protocols import StateDict


@dataclass
class RunSaver:
    """Saves the run of a trainer.

    Args:
        every: How often to save; None for at the end only.
        signals: Signals at which to save before the run ends.
        on_saved: Called with the path of each checkpoint that was saved.
        at_start: The fingerprints of frozen tensors at the start of the run, which checkpoints then leave out; None to
            save all tensors.
        saved_at: The progress of the run when a checkpoint was last due, whether or not it could be saved.
    """

    trainer: TrainerCore
    manager: CheckpointManager
    every: Cadence | None
    signals: Collection[signal.Signals]
    allows_non_finite: bool
    on_saved: Callable[[str], None]
    at_start: Fingerprints | None = None
    saved_at: Progress = field(default_factory=Progress)
    _best_values: list[float] = field(default_factory=list)
    _is_among_best: bool = False
    _level: int = logging.DEBUG
    _requests: list[tuple[str | None, str]] = field(default_factory=list)

    def request(self, path: str | None, label: str) -> str:
        """Request a checkpoint as soon as the run can be saved, and return where it will be. A collective."""
        self._requests.append((path, label))
        store, step = self.manager.store, self.trainer.progress.steps
        return path or store.locate(self.manager.call_on_rank_0(lambda: store.free_name(step)))

    def observe(self, values: Mapping[str, float]) -> None:
        """Save the run as soon as possible, if the value that ranks checkpoints is among the best so far."""
        best = self.manager.retention.best
        if best is None or not self.trainer.progress.steps:
            return
        value = values.get(best.resolved_monitor.name, math.nan)
        if (best_values := add_if_best(self._best_values, value, best)) is not None:
            self._best_values, self._is_among_best = best_values, True

    def save_if_due(self) -> None:
        """Save the run if a checkpoint is due or was requested. A collective, between two steps or epochs."""
        self.manager.check()
        run = self.trainer.run
        if not (self._requests or self._is_due()):
            return
        if run.stopping.exit_code is None and run.is_within_epoch:
            run.stopping.agree_on_clock(run.progress)  # a signal ends the run here, with one checkpoint
        self.save()

    def save(self, level: int = logging.DEBUG) -> None:
        """Save the run, unless its weights are not finite.

        Args:
            level: Level of the message. It is INFO if the checkpoint was requested, is among the best or is the last.
        """
        requests, self._requests = self._requests or [(None, "")], []
        was_among_best, self._is_among_best = self._is_among_best, False
        run = self.trainer.run
        run.history.read_steps(run.distributed)
        for path, label in requests:
            self.finish()
            self._level = logging.INFO if path or label or was_among_best or run.is_done() else level
            self._save(path, label)

    def finish(self) -> None:
        """Wait for a checkpoint in the background, and report it. A collective."""
        if (path := self.manager.finish()) is not None:
            self._report(path)

    def _report(self, path: str) -> None:
        announce(self.trainer, f"saved {path}", self._level)
        self.on_saved(path)

    def save_on_exception(self) -> None:
        """Save the run before an exception ends it, even if the checkpoint before failed.

        Errors become warnings, since the exception itself is raised afterwards.
        """
        for act in (self.finish, functools.partial(self.save, logging.INFO), self.finish):
            try:
                act()
            except Exception as failure:  # noqa: BLE001
                warnings.warn(f"The run could not be saved either: {failure}", stacklevel=2)

    def _is_due(self) -> bool:
        run, last = self.trainer.run, self.saved_at
        now = run.progress
        if (now.steps, now.epochs, now.batches) == (last.steps, last.epochs, last.batches):
            return False
        if run.stopping.exit_code is not None:
            return run.stopping.exit_code - 128 in self.signals
        return run.is_done() or self._is_among_best or (self.every is not None and run.is_due(self.every, last))

    def _save(self, path: str | None, label: str) -> None:
        if path is None:
            self.saved_at = self.trainer.progress  # first, since the checkpoint contains it
        with self.trainer.run.optimizer_modes.evaluating():
            saved = self._begin(path, label)
        if saved is not None:
            self._report(saved)

    def _begin(self, path: str | None, label: str) -> str | None:
        """Save the present state, or begin to save it in the background. Return the path of a complete checkpoint."""
        now = self.trainer.progress
        shared, own = collect_parts(self.trainer)
        weights = () if self.allows_non_finite else local_parameters(self.trainer, shared[MODEL])
        if names := [name for name in self.trainer.distributed.gather(first_non_finite(weights)) if name]:
            self.manager.warn(f"The run was not saved after step {now.steps}: {names[0]} holds NaN or infinity.")
            return None
        if self.at_start is not None:
            shared = leave_out_frozen(self.trainer, shared, self.at_start)
        manifest = Manifest(
            name="",
            run=self.manager.identity,
            step=now.steps,
            epoch=now.epochs,
            offset=now.offset,
            world_size=self.trainer.distributed.world_size,
            label=label,
            parts=tuple(shared),
            metrics=self.trainer.run.current_values(),
        )
        return self.manager.begin(manifest, *move_shards(shared, own), path)

    def state_dict(self) -> StateDict:
        """Return when a checkpoint was last due, the best values, and the versions of packages that affect results."""
        return {"saved_at": asdict(self.saved_at), "versions": get_versions(), "best_values": self._best_values}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore the state, and warn if versions have changed."""
        self.saved_at, self._best_values = Progress(**state_dict["saved_at"]), state_dict["best_values"]
        before, now = state_dict["versions"], get_versions()
        if changed := [f"{name} {before[name]} -> {now[name]}" for name in now if before.get(name) != now[name]]:
            warnings.warn(
                f"The run resumes with other versions ({', '.join(changed)}), so results may differ in the last bits.",
                stacklevel=2,
            )


def local_parameters(trainer: TrainerCore, weights: StateDict) -> list[tuple[str, Tensor]]:
    """Return the parameters of a checkpoint that this rank has, in full or as its shards, by name."""
    names = {canonical_name(name) for name, _ in trainer.unwrapped_model.named_parameters()}
    return [
        (name, to_local(tensor)) for name, tensor in weights.items() if name in names and not is_placeholder(tensor)
    ]
