"""Events: what callbacks hear, and how everyone who listens to an event is found once and then called in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Generic, ParamSpec

from typing_extensions import TypeVar, override

from ptacc.composition.guards import check_known_hooks
from ptacc.run.history import StepResult
from ptacc.types.monitor import Monitor
from ptacc.types.outputs import EpochRecord, EvalResult

P = ParamSpec("P")
TrainerT_contra = TypeVar("TrainerT_contra", contravariant=True)


class Callback(Generic[TrainerT_contra]):
    """Something that listens to a run, and needs of the trainer what `TrainerT_contra` says.

    Every method is an event, and does nothing until it is overridden. `Callback[TrainerCore]` fits every trainer,
    `Callback[SupportsMetrics]` each that has metrics, `Callback[MyTrainer]` that one.

    Example:
        >>> class Shout(Callback[object]):
        ...     def on_epoch_end(self, trainer: object, record: EpochRecord) -> None:
        ...         print(f"EPOCH {record.epoch}!")
    """

    @override
    def __init_subclass__(cls, **keywords: object) -> None:
        super().__init_subclass__(**keywords)
        check_known_hooks(cls)

    def monitors(self) -> tuple[Monitor, ...]:
        """Return the values that this callback watches; their names are checked before the first step."""
        return ()

    def on_run_start(self, trainer: TrainerT_contra) -> None:
        """The run is set up, and no step is done."""

    def on_run_end(self, trainer: TrainerT_contra) -> None:
        """The run is complete or was stopped; not called after an exception."""

    def on_epoch_start(self, trainer: TrainerT_contra) -> None:
        """An epoch begins."""

    def on_epoch_end(self, trainer: TrainerT_contra, record: EpochRecord) -> None:
        """An epoch ended, its evaluation included."""

    def on_step_start(self, trainer: TrainerT_contra) -> None:
        """A step begins: its batches are loaded."""

    def on_step_end(self, trainer: TrainerT_contra, step: StepResult) -> None:
        """The weights were updated."""

    def on_evaluation_start(self, trainer: TrainerT_contra, name: str) -> None:
        """The evaluation of a set begins; `name` is empty where there is one unnamed set."""

    def on_evaluation_end(self, trainer: TrainerT_contra, name: str, result: EvalResult) -> None:
        """The evaluation of a set ended."""

    def on_prediction_start(self, trainer: TrainerT_contra) -> None:
        """A prediction begins."""

    def on_prediction_end(self, trainer: TrainerT_contra) -> None:
        """A prediction ended."""

    def on_exception(self, trainer: TrainerT_contra, error: BaseException) -> None:
        """The run ends by an exception, which is raised on after this."""

    def on_save(self, trainer: TrainerT_contra, path: str | Path) -> None:
        """A checkpoint was written to `path`: a `Path`, or the URL as a string."""

    def on_load(self, trainer: TrainerT_contra, path: str | Path) -> None:
        """A checkpoint was loaded from `path`: a `Path`, or the URL as a string."""


@dataclass(frozen=True, slots=True)
class Event(Generic[P]):
    """An event with its listeners, found once: those who do not listen cost nothing."""

    listeners: tuple[Callable[P, None], ...]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Tell every listener, in order."""
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
    prediction_start: Event[[]]
    prediction_end: Event[[]]
    exception: Event[[BaseException]]
    save: Event[[str | Path]]
    load: Event[[str | Path]]

    @classmethod
    def collect(cls, trainer: object, base: type, callbacks: Iterable[Callback[Any]]) -> Events:
        """Find the listeners of every event.

        Args:
            trainer: Whose hooks hear first, where its class overrides those of `base`.
            base: The class that declares the hooks, and does nothing in them.
            callbacks: Who hears next, in order.
        """
        heard = tuple(callbacks)

        def listeners(name: str) -> Event[Any]:
            own = [getattr(trainer, name)] if overrides(trainer, base, name) else []
            theirs = [partial(getattr(c, name), trainer) for c in heard if overrides(c, Callback, name)]
            return Event((*own, *theirs))

        events: dict[str, Any] = {event.name: listeners(f"on_{event.name}") for event in fields(cls)}
        return cls(**events)


def overrides(instance: object, base: type, name: str) -> bool:
    """Say whether the class of `instance` overrides the method `name` of `base`."""
    return getattr(type(instance), name) is not getattr(base, name)
