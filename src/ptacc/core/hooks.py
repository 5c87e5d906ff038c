"""`TrainerCore`: components, lifecycle hooks and the state of the run. It knows no batch.

Trainers and callbacks share one vocabulary of events. A trainer's own hooks hear of each before its callbacks do.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from ptacc.core.checks import check_callbacks
from ptacc.core.compose import Composable, hook
from ptacc.core.device import AcceleratorBuilder, accelerator_for
from ptacc.core.engine import Engine, Slot, TorchEngine
from ptacc.core.events import Callback, Events
from ptacc.core.history import RunHistory, StepResult
from ptacc.core.peers import Peers
from ptacc.core.randomness import fresh_seed
from ptacc.core.roles import Role
from ptacc.core.run import Run
from ptacc.errors import NoRunError, OptionError
from ptacc.protocols import DeviceRuntime
from ptacc.types import EpochRecord, EvalResult, Monitored, Progress


@dataclass
class TrainerState:
    """What a trainer has only at times.

    Args:
        run: The current run, or the last one.
        bare_model: The user's model, while a wrapped one stands in its place.
        runtime: The accelerator and the processes, once they were needed.
        process: The process that needed them; a fork of it needs its own.
    """

    run: Run | None = None
    bare_model: nn.Module | None = None
    runtime: tuple[DeviceRuntime, Peers] | None = None
    process: int = 0


class TrainerCore(Composable):
    """What every trainer and every mixin is: components, hooks, and the state of a run.

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

    # ---- what a trainer has

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

    @property
    def accelerator(self) -> DeviceRuntime:
        """Accelerate's `Accelerator`, made at first use and shared by trainers that need the same."""
        return self._runtime()[0]

    @property
    def peers(self) -> Peers:
        """The processes of this launch."""
        return self._runtime()[1]

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.accelerator.device

    @property
    def unwrapped_model(self) -> nn.Module:
        """The user's bare model; within a run, `model` is the wrapped one."""
        return self.model if self._state.bare_model is None else self._state.bare_model

    def _stand_in(self, model: nn.Module) -> None:
        """Put `model` in the place of the option, which type checkers take for the user's own."""
        self.model = model

    def stop(self, reason: str) -> None:
        """Ask for the end of the run after the current step.

        All processes agree on it, and end at the same step; `history.stop_reason` says why.
        """
        self.run.wish_to_stop(reason)

    def print(self, *args: object) -> None:
        """Print once, on rank 0."""
        if self.peers.rank == 0:
            print(*args)  # noqa: T201  # this is what it is for

    # ---- factories and folds: how a run is set up

    @hook("fold")
    def configure_accelerator(self, builder: AcceleratorBuilder) -> None:
        """Write this mixin's settings of the accelerator: `super()` first, then `builder.write(MyMixin, ...)`."""

    @hook("fold")
    def reported_values(self) -> frozenset[str]:
        """Return the names of the values that monitors can watch, those of `super()` included."""
        return frozenset({"train_loss", "learning_rate"})

    @hook("fold")
    def evaluated_values(self) -> frozenset[str]:
        """Return the names of the metrics that each evaluation reports, those of `super()` included."""
        return frozenset()

    @hook("fold")
    def watched_values(self) -> tuple[tuple[object, Monitored], ...]:
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
        return TorchEngine(self.accelerator, self.unwrapped_model, self.slots())

    @hook("factory")
    def make_seed(self) -> int:
        """Choose the seed of a run. All processes get rank 0's."""
        return fresh_seed()

    @hook("default")
    def batches_per_step(self) -> int:
        """Return how many batches each process takes for one step."""
        return 1

    @hook("default")
    def slots(self) -> tuple[Slot, ...]:
        """Return the optimizers by name."""
        return (Slot.of("optimizer", self.optimizer),)

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
    def on_save(self, path: Path) -> None:
        """A checkpoint was written to `path`."""

    @hook("event")
    def on_load(self, path: Path) -> None:
        """A checkpoint was loaded from `path`."""

    # ---- any-of

    @hook("any-of")
    def should_stop(self) -> str | None:
        """Return the reason to stop after this step, None to go on: `return super().should_stop() or ...`."""
        return None

    def _runtime(self) -> tuple[DeviceRuntime, Peers]:
        if self._state.runtime is None or self._state.process != os.getpid():
            builder = AcceleratorBuilder()
            self.configure_accelerator(builder)
            self._state.runtime, self._state.process = accelerator_for(self, builder), os.getpid()
        return self._state.runtime

    def _listeners(self) -> Events:
        return Events.of(self, TrainerCore, self.all_callbacks())


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
