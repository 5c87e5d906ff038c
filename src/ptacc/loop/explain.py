"""What a trainer will do, told before it does it: `trainer.explain()`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from ptacc.composition.fields import own_annotations
from ptacc.composition.guards import calls_super, get_hook_shape
from ptacc.core.callback import Callback, overrides
from ptacc.core.hooks import TrainerCore
from ptacc.loop.advice import advice_on
from ptacc.types.progress import RunPlan
from ptacc.types.protocols import Stateful

VALUE_WIDTH = 48


@dataclass(frozen=True)
class Section:
    """One table of an explanation: a title, and rows of cells."""

    title: str
    rows: tuple[tuple[str, ...], ...]

    @override
    def __str__(self) -> str:
        if not self.rows:
            return f"{self.title}\n  (none)"
        widths = [max(len(row[i]) for row in self.rows) for i in range(len(self.rows[0]))]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in self.rows)
        return "\n".join([self.title, *(f"  {line}".rstrip() for line in lines)])


@dataclass(frozen=True)
class Explanation:
    """What a trainer will do, as tables: `print` it, or look a section up by its title."""

    sections: tuple[Section, ...]

    def __getitem__(self, title: str) -> tuple[tuple[str, ...], ...]:
        """Return the rows of a section.

        Raises:
            KeyError: There is none of this title.
        """
        return {section.title: section.rows for section in self.sections}[title]

    def __contains__(self, title: object) -> bool:
        """Say whether there is a section of this title."""
        return any(section.title == title for section in self.sections)

    @override
    def __str__(self) -> str:
        return "\n\n".join(map(str, self.sections))


def explain(
    trainer: TrainerCore, samples: int | None, batch_size: int, lengths: tuple[int | None, int | None]
) -> Explanation:
    """Explain a trainer.

    Args:
        trainer: The trainer.
        samples: Samples of an epoch, where they are known.
        batch_size: Samples of a batch of one process.
        lengths: `num_epochs` and `max_steps`.
    """
    sections = (
        Section("classes, in the order in which they are asked", class_rows(type(trainer))),
        Section("hooks, each calling the next by super()", hook_rows(trainer)),
        Section("options", option_rows(trainer)),
        Section("launch", launch_rows(trainer)),
        Section("batches", batch_rows(trainer, samples, batch_size, lengths)),
        Section("state", state_rows(trainer)),
    )
    advice = advice_rows(trainer)
    return Explanation((*sections, Section("what would be faster", advice)) if advice else sections)


def class_rows(cls: type) -> tuple[tuple[str, ...], ...]:
    """Return each class with the first sentence of its docstring."""
    shown = [base for base in cls.__mro__ if TrainerCore in base.__mro__]
    return tuple((base.__name__, first_sentence(base)) for base in shown)


def hook_rows(trainer: TrainerCore) -> tuple[tuple[str, ...], ...]:
    """Return each hook that somebody overrides, its shape, and who is called, in order: classes, then callbacks."""
    rows = []
    for name, shape in sorted(declared_hooks(type(trainer)).items()):
        heard = [f"[{type(callback).__name__}]" for callback in trainer.all_callbacks() if listens(callback, name)]
        called = [*classes_called(type(trainer), name), *heard]
        if called:
            rows.append((name, shape, " > ".join(called)))
    return tuple(rows)


def declared_hooks(cls: type) -> dict[str, str]:
    """Return the shape of each hook that the bases of a class declare, by name."""
    members = {name: value for base in cls.__mro__ for name, value in base.__dict__.items() if get_hook_shape(value)}
    return {name: get_hook_shape(value) or "" for name, value in members.items()}


def classes_called(cls: type, name: str) -> list[str]:
    """Return the names of the overrides of a hook that are reached, in order; empty where nobody overrides it."""
    called: list[str] = []
    for base in cls.__mro__:
        member = base.__dict__.get(name)
        if member is None:
            continue
        if get_hook_shape(member) is not None:  # who declares the hook: worth a mention where it does something
            return [*called, base.__name__] if called and get_hook_shape(member) == "default" else called
        called.append(base.__name__)
        if not calls_super(member):
            break
    return called


def listens(callback: Callback[Any], name: str) -> bool:
    """Say whether a callback overrides the event `name`."""
    return hasattr(Callback, name) and overrides(callback, Callback, name)


def option_rows(trainer: TrainerCore) -> tuple[tuple[str, ...], ...]:
    """Return each option with its value and where that came from: an argument, or the class that set the default."""
    given = trainer.given_options()
    return tuple(
        (
            option.name,
            shown(getattr(trainer, option.name)) if option.repr else "not shown",
            origin(type(trainer), option.name, option.name in given),
        )
        for option in dataclasses.fields(trainer)
        if option.init
    )


def launch_rows(trainer: TrainerCore) -> tuple[tuple[str, ...], ...]:
    """Return what came of the launch and the options together."""
    accelerator = trainer.accelerator
    asked = getattr(trainer, "mixed_precision", None)
    return (
        ("device", str(accelerator.device), ""),
        ("processes", str(accelerator.num_processes), f"this one is rank {accelerator.process_index}"),
        ("precision", accelerator.mixed_precision, "as launched" if asked is None else "option mixed_precision"),
    )


def batch_rows(
    trainer: TrainerCore, samples: int | None, batch_size: int, lengths: tuple[int | None, int | None]
) -> tuple[tuple[str, ...], ...]:
    """Return the arithmetic from a process's batch to the steps of the run."""
    replicas, batches = trainer.distributed.replicas, trainer.accumulation_steps()
    step = batch_size * replicas * batches
    sharing = "processes" if replicas == trainer.distributed.world_size else "replicas"
    rows = [("samples a step", f"{batch_size} a batch x {replicas} {sharing} x {batches} batches a step = {step}")]
    if samples is not None:
        per_process = math.ceil(samples / (batch_size * replicas))
        plan = RunPlan.compute(lengths[0], math.ceil(per_process / batches), lengths[1])
        rows.append(("steps an epoch", f"{samples} samples / {step} = {plan.steps_per_epoch}"))
        if plan.known_total_steps is not None:
            rows.append(("steps in all", f"{plan.total_steps}, in {plan.num_epochs} epochs"))
    return tuple(rows)


def state_rows(trainer: TrainerCore) -> tuple[tuple[str, ...], ...]:
    """Return the parts of the state."""
    weights = trainer.unwrapped_model.state_dict()
    megabytes = sum(tensor.numel() * tensor.element_size() for tensor in weights.values()) / 1e6
    rows = [("model", f"{type(trainer.unwrapped_model).__name__}: {len(weights)} tensors, {megabytes:.3g} MB")]
    rows += [(slot.name, type(slot.optimizer).__name__) for slot in trainer.optimizer_slots()]
    rows += [("progress, history, random states, position in the data", "of each run")]
    if trainer.has_run:
        rows += [(key.name, type(state).__name__) for key, state in trainer.run.states() if isinstance(state, Stateful)]
    rows += [(type(c).__name__, "callback") for c in trainer.all_callbacks() if isinstance(c, Stateful)]
    return tuple(rows)


def advice_rows(trainer: TrainerCore) -> tuple[tuple[str, ...], ...]:
    """Return what would be faster, each with what to write."""
    model, precision = trainer.unwrapped_model, trainer.accelerator.mixed_precision
    is_sharded = trainer.resume_invariants()["engine"] != "torch"
    return advice_on(model, trainer.optimizer_slots(), trainer.device, precision=precision, is_sharded=is_sharded)


def origin(cls: type, name: str, is_given: bool) -> str:
    """Say where an option's value came from."""
    if is_given:
        return "argument"
    owner = next(base for base in cls.__mro__ if name in own_annotations(base))
    return f"default of {owner.__name__}"


def first_sentence(cls: type) -> str:
    """Return the first line of a class's own docstring, empty where it has none but what a dataclass makes up."""
    text = (cls.__dict__.get("__doc__") or "").strip()
    return "" if text.startswith(f"{cls.__name__}(") else text.split("\n")[0]


def shown(value: object) -> str:
    """Write a value in one short line."""
    if isinstance(value, nn.Module | Optimizer):
        return f"{type(value).__name__}(...)"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(type(part).__name__ for part in value)}]"
    if isinstance(value, dict):
        return ", ".join(map(str, value)) or "{}"
    text = getattr(value, "__name__", None) or repr(value)
    return text if len(text) <= VALUE_WIDTH else text[: VALUE_WIDTH - 3] + "..."
