"""The configuration of a run, as trackers store it."""

from __future__ import annotations

import dataclasses
import os

from ptacc.core.hooks import TrainerCore
from ptacc.loop.explain import class_rows, launch_rows, shorten
from ptacc.tracking.tracker import ConfigValue


def collect_config(trainer: TrainerCore) -> dict[str, ConfigValue]:
    """Return the classes, the launch, the options, the arguments of `train()` and the settings of the optimizers."""
    run, options = trainer.run, [option for option in dataclasses.fields(trainer) if option.init]
    return {
        "classes": " > ".join(name for name, _ in class_rows(type(trainer))),
        **{name: value for name, value, _ in launch_rows(trainer)},
        **{option.name: plain(getattr(trainer, option.name)) if option.repr else "(hidden)" for option in options},
        **{name: plain(value) for name, value in run.options.items()},
        "seed": run.seed,
        **{
            f"{slot.name}.{name}": value
            for slot in trainer.optimizer_slots()
            for name, value in slot.optimizer.defaults.items()
            if isinstance(value, bool | int | float | str)
        },
    }


def plain(value: object) -> ConfigValue:
    """Return a number, a bool or a string as it is, a path as a string, and a short text for any other value."""
    if isinstance(value, os.PathLike):
        return str(value)
    return value if isinstance(value, bool | int | float | str) else shorten(value)
