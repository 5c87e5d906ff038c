"""What a mixin adds to a script, and the trainer that a script is written for."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any

from ptacc.core.callback import Callback
from ptacc.core.hooks import TrainerCore
from ptacc.eject.literals import Code


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """What a mixin or a callback adds to a script.

    Args:
        constants: Constants at the head of the script, by name.
        imports: Import statements for code of the user.
        definitions: Functions and classes.
        accelerator: Arguments of `Accelerator(...)`.
        notes: What the script leaves out of the mixin.
        parameters: The parameter of `evaluate` after the model and the loader.
        start: Statements of `train`, before the model is prepared.
        plan: Statements after the loaders are prepared.
        prepared: Statements after the model and the optimizer are prepared. From here on, `original` is the model
            without the wrappers of Accelerate.
        epoch_start: Statements at the start of each epoch, in training mode.
        batch_end: Statements after the backward pass of a batch.
        gradients_ready: Statements before the optimizer steps.
        step_end: Statements after the optimizer has stepped.
        values: Statements that add to the `values` of an epoch before the evaluation.
        evaluation_end: Statements after the evaluation.
        epoch_end: Statements after the evaluation and those of `evaluation_end`.
        stop: Statements after the values of an epoch are printed, which may end the loop.
        end: Statements after the last epoch.
        eval_batch: Statements of `evaluate` for each batch.
        eval_end: Statements of `evaluate` that add to its `values`.
    """

    constants: Mapping[str, object] = field(default_factory=dict)
    imports: Collection[str] = ()
    definitions: str = ""
    accelerator: Sequence[str] = ()
    notes: Sequence[str] = ()
    parameters: str = ""
    start: str = ""
    plan: str = ""
    prepared: str = ""
    epoch_start: str = ""
    batch_end: str = ""
    gradients_ready: str = ""
    step_end: str = ""
    values: str = ""
    evaluation_end: str = ""
    epoch_end: str = ""
    stop: str = ""
    end: str = ""
    eval_batch: str = ""
    eval_end: str = ""


@dataclass(frozen=True)
class Target:
    """A trainer, or a class of trainers whose options have their defaults.

    Args:
        cls: The class.
        name: How the command line names it.
        trainer: The trainer. None for the class.
    """

    cls: type[TrainerCore]
    name: str
    trainer: TrainerCore | None = None

    def option(self, name: str) -> Any:
        """Return the value of an option: `Code("...")` for an option of the class that has no default."""
        if self.trainer is not None:
            return getattr(self.trainer, name)
        option = next(option for option in dataclasses.fields(self.cls) if option.name == name)
        if option.default_factory is not MISSING:
            return option.default_factory()
        return Code("...") if option.default is MISSING else option.default

    def has(self, base: type) -> bool:
        """Return whether the trainer is composed of a class."""
        return issubclass(self.cls, base)

    @property
    def callbacks(self) -> Sequence[Callback[Any]]:
        """The default callbacks and those of the user."""
        return (*self.option("default_callbacks"), *self.option("callbacks"))
