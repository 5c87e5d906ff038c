"""`Callback`, and the dispatch of events to the hooks of a trainer and to its callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Generic, ParamSpec

from typing_extensions import TypeVar, override

from ptacc.composition.guards import check_hooks_are_declared
from ptacc.run.step_result import StepResult
from ptacc.types.monitor import Monitor
from ptacc.types.outputs import EpochRecord, EvalResult

P = ParamSpec("P")
TrainerT_contra = TypeVar("TrainerT_contra", contravariant=True)
CALLED_BY_NAME = frozenset({"monitors", "state_dict", "load_state_dict"})
"""Methods of callbacks that are called, in addition to events."""
NOT_OF_CALLBACKS = {
    "should_stop": "a call of `trainer.stop(reason)`",
    "on_gradients_ready": "a hook of trainers and mixins only",
    "on_batch_end": "a hook of trainers and mixins only, since callbacks do not get batches",
    "on_eval_batch_end": "a hook of trainers and mixins only, since callbacks do not get batches",
}
"""Hooks that callbacks do not have, each with what to use instead."""


class Callback(Generic[TrainerT_contra]):
    """Base class of callbacks: every `on_...` method is called at the event of its name, and does nothing by default.

    The type argument is what the callback needs of a trainer. `Callback[TrainerCore]` works with every trainer,
    `Callback[SupportsMetrics]` with trainers that have metrics, `Callback[MyTrainer]` with that trainer only.

    Example:
        >>> class Shout(Callback[object]):
        ...     def on_epoch_end(self, trainer: object, record: EpochRecord) -> None:
        ...         print(f"EPOCH {record.epoch}!")
    """

    @override
    def __init_subclass__(cls, **keywords: object) -> None:
        super().__init_subclass__(**keywords)
        check_hooks_are_declared(cls, CALLED_BY_NAME, NOT_OF_CALLBACKS)

    def monitors(self) -> tuple[Monitor, ...]:
        """Return the values that this callback monitors; their names are checked before the first step."""
        return ()

    def state_key(self) -> str:
        """Return what distinguishes the state of this callback, in checkpoints, from those of others of its class.

        By default the names of the monitored values. It must be the same when the run is resumed.
        """
        return ".".join(monitor.name for monitor in self.monitors())

    def on_run_start(self, trainer: TrainerT_contra) -> None:
        """The run is set up, and no step has been made."""

    def on_run_end(self, trainer: TrainerT_contra) -> None:
        """The run is complete or was stopped. Not called after an exception."""

    def on_epoch_start(self, trainer: TrainerT_contra) -> None:
        """An epoch begins."""

    def on_epoch_end(self, trainer: TrainerT_contra, record: EpochRecord) -> None:
        """An epoch ended, its evaluation included."""

    def on_step_start(self, trainer: TrainerT_contra) -> None:
        """A step begins: its batches are loaded."""

    def on_step_end(self, trainer: TrainerT_contra, step: StepResult) -> None:
        """The weights were updated."""

    def on_evaluation_start(self, trainer: TrainerT_contra, name: str) -> None:
        """The evaluation of a dataset begins; `name` is empty for a single unnamed dataset."""

    def on_evaluation_end(self, trainer: TrainerT_contra, name: str, result: EvalResult) -> None:
        """The evaluation of a dataset ended."""

    def on_values(self, trainer: TrainerT_contra, values: Mapping[str, float], step: int) -> None:
        """The run reports values: when `log_every` is due, after an evaluation, and at the end of an epoch.

        A step has one report at most, with one exception: data without a length may end after a step that has been
        reported, and the metrics of its epoch follow in a second report. Called on all ranks, with the same values.

        Args:
            trainer: The trainer.
            values: Means since the last report: `train_loss`, `learning_rate`, `items_per_second`, what hooks logged,
                such as `grad_norm`, and the values of `trainer.log`. The evaluation at this step, if there was one, by
                the names that monitors use. At the end of an epoch, its training metrics. `epoch` is its number.
            step: Optimizer steps completed.
        """

    def on_eval_progress(self, trainer: TrainerT_contra, done: int, total: int | None) -> None:
        """An evaluation or a prediction has computed `done` of its `total` batches on this rank; None if unknown."""

    def on_prediction_start(self, trainer: TrainerT_contra) -> None:
        """A prediction begins."""

    def on_prediction_end(self, trainer: TrainerT_contra) -> None:
        """A prediction ended."""

    def on_exception(self, trainer: TrainerT_contra, error: BaseException) -> None:
        """An exception ends the run; it is raised again afterwards."""

    def on_save(self, trainer: TrainerT_contra, path: str) -> None:
        """A checkpoint was written to `path`, a local path or a URL."""

    def on_load(self, trainer: TrainerT_contra, path: str) -> None:
        """A checkpoint was loaded from `path`, a local path or a URL."""


@dataclass(frozen=True, slots=True)
class Event(Generic[P]):
    """An event with its listeners, collected once, so that an event without listeners costs nothing."""

    listeners: tuple[Callable[P, None], ...]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Call every listener, in order."""
        for listener in self.listeners:
            listener(*args, **kwargs)


@dataclass(frozen=True)
class Events:
    """Every event of a trainer with its listeners."""

    run_start: Event[[]]
    run_end: Event[[]]
    epoch_start: Event[[]]
    epoch_end: Event[[EpochRecord]]
    step_start: Event[[]]
    step_end: Event[[StepResult]]
    evaluation_start: Event[[str]]
    evaluation_end: Event[[str, EvalResult]]
    values: Event[[Mapping[str, float], int]]
    eval_progress: Event[[int, int | None]]
    prediction_start: Event[[]]
    prediction_end: Event[[]]
    exception: Event[[BaseException]]
    save: Event[[str | Path]]
    load: Event[[str | Path]]

    @classmethod
    def collect(cls, trainer: object, base: type, callbacks: Iterable[Callback[Any]]) -> Events:
        """Collect the listeners of every event: the trainer's own hooks, and then the callbacks in order.

        Args:
            trainer: The trainer; its hooks are listeners if its class overrides them.
            base: The class that declares the hooks and does nothing in them.
            callbacks: The callbacks; each of their methods that is overridden is a listener.
        """
        callbacks = tuple(callbacks)

        def collect_event(name: str) -> Event[Any]:
            hooks = [getattr(trainer, name)] if overrides(trainer, base, name) else []
            methods = [partial(getattr(c, name), trainer) for c in callbacks if overrides(c, Callback, name)]
            return Event((*hooks, *methods))

        events: dict[str, Any] = {event.name: collect_event(f"on_{event.name}") for event in fields(cls)}
        return cls(**events)


def overrides(instance: object, base: type, name: str) -> bool:
    """Return whether the class of `instance` overrides the method `name` of `base`."""
    return getattr(type(instance), name) is not getattr(base, name)
