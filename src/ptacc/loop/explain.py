"""`trainer.explain()`: a description of what a trainer will do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import PurePath

from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from ptacc.composition.fields import own_annotations
from ptacc.composition.guards import calls_super, get_hook_shape
from ptacc.core.callback import Callback, overrides
from ptacc.core.hooks import TrainerCore
from ptacc.display.numbers import format_bytes
from ptacc.display.tables import Rows, Table, html_section
from ptacc.loop.advice import collect_advice
from ptacc.model.joined_modules import add_places
from ptacc.model.modes import find_eval_roots
from ptacc.model.summary import layer_rows
from ptacc.profiling.memory_estimate import ShardCounts, count_bytes, memory_rows
from ptacc.tensors.structures import iterate_tensors
from ptacc.types.accumulation import as_accumulation
from ptacc.types.progress import Progress, RunPlan
from ptacc.types.protocols import Stateful

VALUE_WIDTH = 48
HEADINGS = {
    "classes": "classes in method resolution order",
    "hooks": "hooks and their overrides in the order of calls; callbacks are in brackets",
    "options": "options",
    "launch": "launch",
    "batches": "batches",
    "layers": "layers with parameters",
    "memory": "estimated memory of each process during training",
    "modes": "modes of the model's modules during a run",
    "state": "state that a checkpoint contains",
    "advice": "advice for faster training",
}
TITLES: dict[str, tuple[str, ...]] = {
    "options": ("option", "value", "source"),
    "layers": ("layer", "class", "parameter shapes", "parameters", "trainable"),
    "memory": ("tensors", "size", "content"),
}
NUMERIC = frozenset({"parameters", "size"})
FOLDED = frozenset({"classes", "hooks", "modes", "state"})
"""The tables that a notebook shows after a click."""


class Explanation(dict[str, Rows]):
    """What a trainer will do: print it, show it in a notebook, or look up the rows of a table by its key.

    The keys are `classes`, `hooks`, `options`, `launch`, `batches`, `layers`, `memory`, `modes` and `state`, and
    `advice` if there is any.
    """

    @override
    def __repr__(self) -> str:
        return "\n\n".join(f"{HEADINGS[key]}\n{table.to_text()}" for key, table in self._tables())

    def _repr_html_(self) -> str:
        return "".join(html_section(HEADINGS[key], table, is_open=key not in FOLDED) for key, table in self._tables())

    def _tables(self) -> Iterator[tuple[str, Table]]:
        return ((key, Table(rows, TITLES.get(key, ()), NUMERIC)) for key, rows in self.items())


def explain(
    trainer: TrainerCore,
    samples: int | None,
    batch_size: int,
    num_epochs: int | None,
    max_steps: int | None,
    shards: ShardCounts,
) -> Explanation:
    """Explain a trainer, for an epoch of some samples, None if unknown, and batches of some samples per rank."""
    explanation = Explanation(
        classes=class_rows(type(trainer)),
        hooks=hook_rows(trainer),
        options=option_rows(trainer),
        launch=launch_rows(trainer),
        batches=batch_rows(trainer, samples, batch_size, num_epochs, max_steps),
        layers=layer_rows({"": trainer.unwrapped_model} | add_places(trainer.trained_outside)),
        memory=memory_rows(
            trainer.trained_modules,
            {slot.name: slot.optimizer for slot in trainer.optimizer_slots()},
            trainer.accelerator.mixed_precision,
            shards,
        ),
        modes=mode_rows(trainer.unwrapped_model),
        state=state_rows(trainer),
    )
    precision, is_sharded = trainer.accelerator.mixed_precision, trainer.resume_invariants()["engine"] != "torch"
    advice = collect_advice(
        trainer.unwrapped_model, trainer.optimizer_slots(), trainer.device, precision=precision, is_sharded=is_sharded
    )
    return Explanation(explanation, advice=advice) if advice else explanation


def class_rows(cls: type) -> Rows:
    """Return each class of the MRO with the first line of its docstring."""
    bases = [base for base in cls.__mro__ if TrainerCore in base.__mro__]
    return tuple((base.__name__, first_line(base)) for base in bases)


def hook_rows(trainer: TrainerCore) -> Rows:
    """Return each overridden hook: its name, its shape, and its overrides in the order of calls."""
    rows = []
    for name, shape in sorted(declared_hooks(type(trainer)).items()):
        listeners = trainer.all_callbacks() if hasattr(Callback, name) else ()
        callbacks = [f"[{type(c).__name__}]" for c in listeners if overrides(c, Callback, name)]
        called = [*overriding_classes(type(trainer), name), *callbacks]
        if called:
            rows.append((name, shape, " > ".join(called)))
    return tuple(rows)


def declared_hooks(cls: type) -> dict[str, str]:
    """Return the shape of each hook that `cls` or its bases declare, by name."""
    members = {name: value for base in cls.__mro__ for name, value in base.__dict__.items() if get_hook_shape(value)}
    return {name: get_hook_shape(value) or "" for name, value in members.items()}


def overriding_classes(cls: type, name: str) -> list[str]:
    """Return the names of the classes whose overrides of a hook are called, in order."""
    called: list[str] = []
    for base in cls.__mro__:
        member = base.__dict__.get(name)
        if member is None:
            continue
        if get_hook_shape(member) is not None:  # the declaration, which is only worth listing if it does something
            return [*called, base.__name__] if called and get_hook_shape(member) == "default" else called
        called.append(base.__name__)
        if not calls_super(member):
            break
    return called


def option_rows(trainer: TrainerCore) -> Rows:
    """Return each option with its value and the source of the value: an argument, or the default of a class."""
    rows = []
    for option in dataclasses.fields(trainer):
        if option.init:
            owner = next(base.__name__ for base in type(trainer).__mro__ if option.name in own_annotations(base))
            origin = "argument" if option.name in trainer.given_options() else f"default of {owner}"
            rows.append((option.name, shorten(getattr(trainer, option.name)) if option.repr else "(hidden)", origin))
    return tuple(rows)


def options_html(trainer: TrainerCore) -> str:
    """Return the options as an HTML table."""
    return html_section(f"{type(trainer).__name__}: options", Table(option_rows(trainer), TITLES["options"]))


def launch_rows(trainer: TrainerCore) -> Rows:
    """Return the device, the ranks and the precision, as the launch and the options determine them."""
    accelerator = trainer.accelerator
    is_option = getattr(trainer, "mixed_precision", None) is not None
    return (
        ("device", str(accelerator.device), ""),
        ("processes", str(accelerator.num_processes), f"this is rank {accelerator.process_index}"),
        ("precision", accelerator.mixed_precision, "option mixed_precision" if is_option else "set by the launch"),
    )


def batch_rows(
    trainer: TrainerCore, samples: int | None, batch_size: int, num_epochs: int | None, max_steps: int | None
) -> Rows:
    """Return how many samples a step takes, and if possible how many steps an epoch and the run take."""
    replicas, accumulation = trainer.distributed.replicas, as_accumulation(trainer.accumulation_steps())
    sharing = "processes" if replicas == trainer.distributed.world_size else "replicas"
    rows, per_batch = [], batch_size * replicas
    for key, batches in {0: accumulation.first, **accumulation.later}.items():
        after = f", after {accumulation.describe(key)}" if key else ""
        factors = f"{batch_size} (batch size) x {replicas} ({sharing}) x {batches} (batches per step)"
        rows.append((f"samples per step{after}", f"{per_batch * batches} = {factors}"))
    if samples is not None:
        num_batches, limits = math.ceil(samples / per_batch), RunPlan.compute(num_epochs, None, max_steps)
        plan = accumulation.revise(limits, Progress(), num_batches, num_batches)
        if not accumulation.later:
            quotient = f"{samples} samples / {per_batch * accumulation.first}, rounded up"
            rows.append(("steps per epoch", f"{plan.steps_per_epoch} = {quotient}"))
        if plan.known_total_steps is not None:
            rows.append(("total steps", f"{plan.total_steps} in {plan.num_epochs} epochs"))
    return tuple(rows)


def mode_rows(model: nn.Module) -> Rows:
    """Return which modules a run trains in training mode, and which stay in eval mode. See `start_training`."""
    if not model.training:
        return (("training", "all modules", "the model is in eval mode, and a run changes that"),)
    in_eval = tuple(find_eval_roots(model))
    rows = [("training", "all other modules" if in_eval else "all modules", "")]
    return (*rows, *(("eval", name, "as it is now, with its submodules") for name in in_eval))


def state_rows(trainer: TrainerCore) -> Rows:
    """Return the parts of the state that a checkpoint contains."""
    weights = trainer.unwrapped_model.state_dict()
    size = format_bytes(count_bytes(iterate_tensors(weights)))
    rows = [("model", f"{type(trainer.unwrapped_model).__name__}: {len(weights)} tensors, {size}")]
    rows += [(slot.name, type(slot.optimizer).__name__) for slot in trainer.optimizer_slots()]
    rows += [("run", "progress, history, random states, position in the data")]
    if trainer.has_run:
        rows += [(key.name, type(state).__name__) for key, state in trainer.run.states() if isinstance(state, Stateful)]
    rows += [(type(c).__name__, "callback") for c in trainer.all_callbacks() if isinstance(c, Stateful)]
    return tuple(rows)


def first_line(cls: type) -> str:
    """Return the first line of a class's own docstring; empty if it has none, or one that `dataclass` generated."""
    text = (cls.__dict__.get("__doc__") or "").strip()
    return "" if text.startswith(f"{cls.__name__}(") else text.split("\n")[0]


def shorten(value: object) -> str:
    """Return a text of at most `VALUE_WIDTH` characters for the value of an option."""
    if isinstance(value, nn.Module | Optimizer):
        return f"{type(value).__name__}(...)"
    if isinstance(value, Sequence) and not isinstance(value, str):
        items = (item.name if isinstance(item, Enum) else type(item).__name__ for item in value)
        return f"[{', '.join(items)}]"
    if isinstance(value, dict):
        return ", ".join(map(str, value)) or "{}"
    text = getattr(value, "__name__", None) or (str(value) if isinstance(value, PurePath) else repr(value))
    return text if len(text) <= VALUE_WIDTH else text[: VALUE_WIDTH - 3] + "..."
