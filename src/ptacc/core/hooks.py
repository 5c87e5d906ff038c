"""`TrainerCore`: the hooks of a run that do not depend on batches, and `Mixin`, the base class of mixins.

A hook has one of seven shapes, which says how overrides combine:

- abstract: a trainer's class must define it (`train_step`), and mixins may refine it.
- default: an override replaces it, or refines the result of `super()`.
- factory: it returns a new object; an override may wrap the result of `super()`.
- fold: an override adds to the result of `super()`.
- around: a context manager; an override runs its block within `super()`'s.
- event: it reacts to something that happened; an override calls `super()` first, or last when it tears down.
- any-of: an override returns `super().should_stop() or ...`.

Events of the trainer and of callbacks have the same names. The trainer's own hooks run before its callbacks.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Generator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.utils.data import DataLoader

from ptacc.composition.composable import hook
from ptacc.composition.roles import Role
from ptacc.core.base import TrainerBase
from ptacc.core.callback import Callback, Events
from ptacc.data.dataloader_config import DataLoaderConfig
from ptacc.engines.base import Engine, OptimizerSlot
from ptacc.engines.default import TorchEngine
from ptacc.engines.replicas import ReplicaEngine
from ptacc.model.optimizer_dict import OptimizerDict
from ptacc.model.option_modules import find_trained_options
from ptacc.profiling.memory_estimate import ShardCounts
from ptacc.rng import fresh_seed
from ptacc.run.state import ResumeState
from ptacc.run.step_result import StepResult
from ptacc.types.accumulation import AccumulationSchedule, as_accumulation
from ptacc.types.monitor import Monitor
from ptacc.types.outputs import EpochRecord, EvalResult
from ptacc.types.protocols import SupportsSyncBatchNorm


class TrainerCore(TrainerBase):
    """What every trainer and every mixin has: the components of a trainer, and the hooks of a run."""

    _role: ClassVar[Role] = "core"

    steps_by_closure: ClassVar[bool] = False
    """Whether the optimizer's `step` is called with a closure: see `ClosureMixin`."""

    # ---- setting up a run

    @hook("default")
    def accumulation_steps(self) -> int | AccumulationSchedule:
        """Return the number of batches that each rank accumulates for one optimizer step. Default hook: 1."""
        return 1

    @hook("default")
    def optimizer_slots(self) -> tuple[OptimizerSlot, ...]:
        """Return the optimizers with their names. Default hook: those of the option `optimizer`."""
        optimizers = {"optimizer": self.optimizer}
        if isinstance(self.optimizer, OptimizerDict):
            optimizers = {f"optimizer.{name}": optimizer for name, optimizer in self.optimizer.items()}
        return tuple(
            OptimizerSlot(name, optimizer, find_trained_options(self, optimizer))
            for name, optimizer in optimizers.items()
        )

    @hook("default")
    def all_callbacks(self) -> Sequence[Callback[Any]]:
        """Return the callbacks of a run, in the order of their calls. Default hook: the default ones come first."""
        return tuple(self.callbacks)

    @hook("factory")
    def make_engine(self) -> Engine:
        """Create the engine of a run, which wraps the model and steps the optimizer.

        Factory hook, called once at the start of each run. An override that does not apply returns
        `super().make_engine()`.
        """
        accelerator, model, slots = self.accelerator, self.unwrapped_model, self.optimizer_slots()
        if accelerator.num_processes == 1:
            return TorchEngine(accelerator, model, slots)
        is_synchronized = isinstance(self, SupportsSyncBatchNorm) and self.sync_batch_norm
        return ReplicaEngine(accelerator, model, slots, is_synchronized=is_synchronized)

    @hook("factory")
    def make_train_dataloader(self, request: DataLoaderConfig) -> DataLoader[object]:
        """Build the training DataLoader. ptacc splits its batches over the processes.

        Factory hook: an override may call `super()` with a changed request. The dataset, order and collate function of
        the loader are kept.
        """
        return request.build(shuffle=True)

    @hook("factory")
    def make_eval_dataloader(self, request: DataLoaderConfig) -> DataLoader[object]:
        """Build the DataLoader of an evaluation or a prediction. Factory hook."""
        return request.build(shuffle=False)

    @hook("factory")
    def make_seed(self) -> int:
        """Choose the seed of a new run. Factory hook, called on all ranks; rank 0's seed is used."""
        return fresh_seed()

    @hook("factory")
    def find_resume_state(self) -> ResumeState | None:
        """Find the saved state to resume from, None for a new run. Factory hook, called on all ranks by `train()`."""
        return None

    @hook("fold")
    def resume_invariants(self) -> dict[str, str]:
        """Return what must not change when a run is resumed, by name.

        Fold: return `{**super().resume_invariants(), ...}`. A run records the values, and a resumed run compares them
        with its own.
        """
        kinds = [
            f"{type(slot.optimizer).__module__}.{type(slot.optimizer).__qualname__}" for slot in self.optimizer_slots()
        ]
        return {
            "engine": "torch",
            "optimizer": ", ".join(kinds),
            "precision": self.accelerator.mixed_precision,
            "accumulation_steps": str(self._accumulation()),
            **{
                f"{slot.name}.{name}": value
                for slot in self.optimizer_slots()
                for name, value in slot.settings(self.unwrapped_model)
            },
        }

    @hook("fold")
    def stop_signals(self) -> frozenset[signal.Signals]:
        """Return the signals that end a run after the current step.

        Fold: return `super().stop_signals() | {...}`. Called once at the start of a run.
        """
        return frozenset({signal.SIGTERM})

    # ---- a step

    @hook("default")
    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a batch's loss, which is scaled to its share of the step's loss. Default hook."""
        self.run.engine.backward(loss)

    # ---- reported values

    @hook("fold")
    def train_value_names(self) -> frozenset[str]:
        """Return the names of values that a run reports apart from its evaluations, for monitors.

        Fold: return `super().train_value_names() | {...}`. Called at the start of a run.
        """
        return frozenset({"train_loss", "learning_rate"})

    @hook("fold")
    def eval_value_names(self) -> frozenset[str]:
        """Return the names of the metrics that each evaluation reports, for monitors.

        Fold: return `super().eval_value_names() | {...}`. Called at the start of a run.
        """
        return frozenset()

    @hook("fold")
    def monitors(self) -> tuple[tuple[object, Monitor], ...]:
        """Return the values that mixins and callbacks monitor, each with the object that monitors it.

        Fold: return `(*super().monitors(), (self, Monitor(...)))`. Their names are checked before the first step.
        """
        return tuple((callback, monitor) for callback in self.all_callbacks() for monitor in callback.monitors())

    @hook("fold")
    def compute_metrics(self) -> dict[str, float]:
        """Compute the metrics of an evaluation, on all ranks at its end. Fold: `super().compute_metrics() | {...}`."""
        return {}

    @hook("fold")
    def compute_train_metrics(self) -> dict[str, float]:
        """Compute metrics over an epoch's training batches, on all ranks at its end. Fold, like `compute_metrics`."""
        return {}

    # ---- around: `with super().around_...(): yield`

    @hook("around")
    @contextlib.contextmanager
    def around_run(self) -> Generator[None]:
        """Surround a run. Around: what an override sets up is undone after the run, also after an exception."""
        yield

    @hook("around")
    @contextlib.contextmanager
    def around_epoch(self) -> Generator[None]:
        """Surround an epoch, including its evaluation. Around."""
        yield

    @hook("around")
    @contextlib.contextmanager
    def around_step(self) -> Generator[None]:
        """Surround an optimizer step: forward and backward passes and the update. Around."""
        yield

    @hook("around")
    @contextlib.contextmanager
    def around_evaluation_weights(self) -> Generator[None]:
        """Surround the use of the model in evaluations and predictions.

        Around: an override swaps in other weights, such as an EMA, and restores the model's own afterwards. Within a
        run, optimizers with modes are in eval mode for the block.
        """
        with self.run.optimizer_modes.evaluating() if self.is_running else contextlib.nullcontext():
            yield

    @hook("around")
    @contextlib.contextmanager
    def around_evaluation(self) -> Generator[None]:
        """Surround the evaluation of one dataset. Around."""
        yield

    @hook("around")
    @contextlib.contextmanager
    def around_prediction(self) -> Generator[None]:
        """Surround a prediction. Around."""
        yield

    # ---- events: `super()` first, or last when tearing down

    @hook("event")
    def on_run_start(self) -> None:
        """Event: the run is set up, and no step has been made. Create this mixin's part of the run state here."""

    @hook("event")
    def on_run_end(self) -> None:
        """Event: the run is complete or was stopped. Not called after an exception."""

    @hook("event")
    def on_epoch_start(self) -> None:
        """Event: an epoch begins."""

    @hook("event")
    def on_epoch_end(self, record: EpochRecord) -> None:
        """Event: an epoch ended, its evaluation included."""

    @hook("event")
    def on_step_start(self) -> None:
        """Event: a step begins; its batches are loaded."""

    @hook("event")
    def on_gradients_ready(self, step: StepResult) -> None:
        """Event: the gradients of a step are complete and unscaled, before the update. Clip or inspect them here."""

    @hook("event")
    def on_step_end(self, step: StepResult) -> None:
        """Event: the weights were updated. Not called for a step that the gradient scaler skipped."""

    @hook("event")
    def on_evaluation_start(self, name: str) -> None:
        """Event: the evaluation of a dataset begins; `name` is empty for a single unnamed dataset."""

    @hook("event")
    def on_evaluation_end(self, name: str, result: EvalResult) -> None:
        """Event: the evaluation of a dataset ended."""

    @hook("event")
    def on_values(self, values: Mapping[str, float], step: int) -> None:
        """Event: the run reports values, after a step or an epoch. See `Callback.on_values`."""

    @hook("event")
    def on_eval_progress(self, done: int, total: int | None) -> None:
        """Event: an evaluation or a prediction has computed `done` of its `total` batches on this rank."""

    @hook("event")
    def on_prediction_start(self) -> None:
        """Event: a prediction begins."""

    @hook("event")
    def on_prediction_end(self) -> None:
        """Event: a prediction ended."""

    @hook("event")
    def on_exception(self, error: BaseException) -> None:
        """Event: an exception ends the run; it is raised again afterwards."""

    @hook("event")
    def on_save(self, path: str) -> None:
        """Event: a checkpoint was written to `path`, a local path or a URL."""

    @hook("event")
    def on_load(self, path: str) -> None:
        """Event: a checkpoint was loaded from `path`, a local path or a URL."""

    # ---- saving and loading: events for mixins that do it; callbacks have `on_save` and `on_load`

    @hook("event")
    def save_run_state(self) -> None:
        """Event: the run can be saved here. An override saves it if a save is due.

        Called on all ranks between two steps and between two epochs, when their states are consistent.
        """

    @hook("event")
    def load_run_state(self) -> None:
        """Event: a resumed run is set up. An override restores its state from `run.saved`.

        Called after `on_run_start`. If the run resumes within an epoch, it is called again after `on_epoch_start`,
        since hooks reset their state there.
        """

    @hook("event")
    def save_on_exception(self, error: BaseException) -> None:
        """Event: `error` ends a run of a single process between two steps. An override saves the run."""

    # ---- stopping

    @hook("any-of")
    def should_stop(self) -> str | None:
        """Return the reason to stop after the current step, or None to continue.

        Any-of: `return super().should_stop() or ...`. Called after every step and every epoch.
        """
        return None

    @contextlib.contextmanager
    def _reserved(self) -> Generator[None]:
        """Reserve or prepare what a run needs, from before its set-up until it has ended. A collective."""
        yield

    def _accumulation(self) -> AccumulationSchedule:
        return as_accumulation(self.accumulation_steps())

    def _frozen_as_in_run(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the parameters are frozen that a run freezes at its start."""
        return contextlib.nullcontext()

    def _shard_counts(self) -> ShardCounts:
        """Return over how many ranks the engine shards weights, gradients and optimizer state."""
        return ShardCounts()

    def _events(self) -> Events:
        return Events.collect(self, TrainerCore, self.all_callbacks())


class Mixin(TrainerCore):
    """Base class of mixins whose hooks do not receive batches: it has options and hooks.

    In a class definition, mixins come before the loop. A mixin keeps its state of a run in `self.run`, under a
    `StateKey`, and creates it in `on_run_start`.
    """

    _role: ClassVar[Role] = "mixin"

    def _mixins_must_come_before_the_loop(self) -> int:
        """Make type checkers report a mixin that comes after the loop; never called.

        The loop defines this method to return `object`. Type checkers accept this narrower override only if it comes
        first in the MRO, and they name the method in the error.
        """
        return 0
