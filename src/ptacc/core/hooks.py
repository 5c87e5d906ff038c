"""`TrainerCore`: the hooks of a run's life. It knows no batch.

Trainers and callbacks share one vocabulary of events. A trainer's own hooks hear of each before its callbacks do.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ptacc.composition.composable import hook
from ptacc.composition.roles import Role
from ptacc.core.base import Components
from ptacc.core.callback import Callback, Events
from ptacc.engines.base import Engine, OptimizerSlot
from ptacc.engines.ddp import TorchEngine
from ptacc.rng import fresh_seed
from ptacc.run.history import StepResult
from ptacc.run.state import ResumeState
from ptacc.types.monitor import Monitor
from ptacc.types.outputs import EpochRecord, EvalResult


class TrainerCore(Components):
    """What every trainer and every mixin is: components, and the hooks of a run's life."""

    _role: ClassVar[Role] = "core"

    # ---- factories and folds: how a run is set up

    @hook("fold")
    def train_value_names(self) -> frozenset[str]:
        """Return the names of the values that monitors can watch, those of `super()` included."""
        return frozenset({"train_loss", "learning_rate"})

    @hook("fold")
    def eval_value_names(self) -> frozenset[str]:
        """Return the names of the metrics that each evaluation reports, those of `super()` included."""
        return frozenset()

    @hook("fold")
    def monitors(self) -> tuple[tuple[object, Monitor], ...]:
        """Return what this trainer's mixins watch, each with who watches it, those of `super()` included."""
        return tuple((callback, monitored) for callback in self.all_callbacks() for monitored in callback.monitors())

    @hook("fold")
    def compute_metrics(self) -> dict[str, float]:
        """Return the metrics of the evaluation that ends, those of `super()` included. All processes call it."""
        return {}

    @hook("fold")
    def compute_train_metrics(self) -> dict[str, float]:
        """Return the metrics over the epoch's training batches, those of `super()` included. All processes call it."""
        return {}

    @hook("factory")
    def make_engine(self) -> Engine:
        """Make the engine of a run: it wraps the model and steps the optimizer."""
        return TorchEngine(self.accelerator, self.unwrapped_model, self.optimizer_slots())

    @hook("factory")
    def make_seed(self) -> int:
        """Choose the seed of a run. All processes get rank 0's."""
        return fresh_seed()

    @hook("factory")
    def find_resume_state(self) -> ResumeState | None:
        """Find the saved run that `train()` goes on with; None to begin a run. All processes call it."""
        return None

    @hook("fold")
    def stop_signals(self) -> frozenset[signal.Signals]:
        """Return the signals at which a run ends after the present step, those of `super()` included."""
        return frozenset({signal.SIGTERM})

    @hook("fold")
    def resume_invariants(self) -> dict[str, str]:
        """Return what has to be the same when a run goes on from a checkpoint, by name, that of `super()` included."""
        kinds = [
            f"{type(slot.optimizer).__module__}.{type(slot.optimizer).__qualname__}" for slot in self.optimizer_slots()
        ]
        return {
            "engine": "torch",
            "optimizer": ", ".join(kinds),
            "precision": self.accelerator.mixed_precision,
            "accumulation_steps": str(self.accumulation_steps()),
        }

    @hook("default")
    def accumulation_steps(self) -> int:
        """Return how many batches each process takes for one step."""
        return 1

    @hook("default")
    def optimizer_slots(self) -> tuple[OptimizerSlot, ...]:
        """Return the optimizers by name."""
        return (OptimizerSlot.create("optimizer", self.optimizer),)

    @hook("default")
    def all_callbacks(self) -> Sequence[Callback[Any]]:
        """Return the callbacks of a run, the default ones first."""
        return tuple(self.callbacks)

    # ---- around: contexts, `with super().around_...(): yield`

    @hook("around")
    @contextlib.contextmanager
    def around_run(self) -> Iterator[None]:
        """Surround a run; what is set here is put back at its end, also after an exception."""
        yield

    @hook("around")
    @contextlib.contextmanager
    def around_epoch(self) -> Iterator[None]:
        """Surround an epoch."""
        yield

    @hook("around")
    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        """Surround a step: forward, backward, update."""
        yield

    @hook("around")
    @contextlib.contextmanager
    def around_evaluation_weights(self) -> Iterator[None]:
        """Have in the model, for the block, the weights that evaluations and predictions are made with."""
        yield

    @hook("around")
    @contextlib.contextmanager
    def around_evaluation(self) -> Iterator[None]:
        """Surround the evaluation of a set."""
        yield

    @hook("around")
    @contextlib.contextmanager
    def around_prediction(self) -> Iterator[None]:
        """Surround a prediction."""
        yield

    # ---- events: `super()` first, and last in what tears down

    @hook("event")
    def on_run_start(self) -> None:
        """The run is set up, and no step is done: make this mixin's part of the run state here."""

    @hook("event")
    def on_run_end(self) -> None:
        """The run is complete or was stopped; not called after an exception."""

    @hook("event")
    def on_epoch_start(self) -> None:
        """An epoch begins."""

    @hook("event")
    def on_epoch_end(self, record: EpochRecord) -> None:
        """An epoch ended, its evaluation included."""

    @hook("event")
    def on_step_start(self) -> None:
        """A step begins: its batches are loaded."""

    @hook("event")
    def on_gradients_ready(self, step: StepResult) -> None:
        """The gradients of a step are whole and unscaled, and the update comes next: clip or look at them here."""

    @hook("event")
    def on_step_end(self, step: StepResult) -> None:
        """The weights were updated; not called for a step that the scaler skipped."""

    @hook("event")
    def on_evaluation_start(self, name: str) -> None:
        """The evaluation of a set begins; `name` is empty where there is one unnamed set."""

    @hook("event")
    def on_evaluation_end(self, name: str, result: EvalResult) -> None:
        """The evaluation of a set ended."""

    @hook("event")
    def on_prediction_start(self) -> None:
        """A prediction begins."""

    @hook("event")
    def on_prediction_end(self) -> None:
        """A prediction ended."""

    @hook("event")
    def on_exception(self, error: BaseException) -> None:
        """The run ends by an exception, which is raised on after this."""

    @hook("event")
    def on_save(self, path: str | Path) -> None:
        """A checkpoint was written to `path`: a `Path`, or the URL as a string."""

    @hook("event")
    def on_load(self, path: str | Path) -> None:
        """A checkpoint was loaded from `path`: a `Path`, or the URL as a string."""

    # ---- how a run is saved: for mixins that do that; callbacks hear of `on_save` and `on_load`

    @hook("event")
    def save_run_state(self) -> None:
        """Save the run, if it is time to: all processes are between two steps or two epochs, their state whole."""

    @hook("event")
    def load_run_state(self) -> None:
        """Put back what was saved of `run.saved`.

        This is called after `on_run_start`, and again after `on_epoch_start` where the run goes on within an epoch,
        since hooks begin an epoch anew.
        """

    @hook("event")
    def save_on_exception(self, error: BaseException) -> None:
        """Save the run, which ends by `error` between two steps, with its state whole. One process alone calls it."""

    # ---- any-of

    @hook("any-of")
    def should_stop(self) -> str | None:
        """Return the reason to stop after this step, None to go on: `return super().should_stop() or ...`."""
        return None

    def _events(self) -> Events:
        return Events.collect(self, TrainerCore, self.all_callbacks())


class Mixin(TrainerCore):
    """The base of every mixin that touches no batch: options, hooks, and nothing else.

    A mixin stands before the loop in a class statement. What it keeps during a run lives under a `StateKey` in
    `self.run`, made in `on_run_start`.
    """

    _role: ClassVar[Role] = "mixin"

    def _mixins_stand_before_the_loop(self) -> int:
        """Exist for type checkers, which refuse a mixin behind the loop: there this returns `object`."""
        return 0

    @classmethod
    def law_options(cls) -> Mapping[str, Any]:
        """Return the options that tests of the laws give this mixin: those that have no default."""
        return {}
