"""The script of a trainer."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping

from ptacc.core.hooks import TrainerCore
from ptacc.eject.catalog import CALLBACKS, LEFT_OUT, MIXINS, REPLACED_CALLBACKS
from ptacc.eject.fragment import Fragment, Target
from ptacc.eject.imports import import_block
from ptacc.eject.literals import WIDTH, Code, assignment, is_plain
from ptacc.eject.optimization import accumulated_steps
from ptacc.eject.parts import make_loss, make_parts
from ptacc.eject.steps import HOOKS, StepFunctions, make_steps
from ptacc.eject.template import BATCH, FUNCTIONS, RECORD, RECORD_WINDOW, WINDOW, fill
from ptacc.errors import OptionError
from ptacc.loop.updates import MultiUpdateLoop
from ptacc.mixins.amp import AMPMixin
from ptacc.mixins.ema import EMAMixin
from ptacc.model.modes import find_eval_roots
from ptacc.model.optimizer_modes import HasModes
from ptacc.trainers.supervised import Trainer

UNWRITTEN = re.compile(r'^    raise NotImplementedError\("write (\w+)"\)$|^(\w+) = \.\.\.$', re.MULTILINE)
HAS_NO_PLACE = re.compile(r"^check_|^predict_step$|_value_names$|^monitors$|^resume_invariants$")
"""Hooks that change nothing of what a script does."""


def make_script(target: Target) -> str:
    """Return the script of a trainer, or of a class with the defaults of its options.

    Raises:
        OptionError: The trainer has several updates a step, or several optimizers.
    """
    if target.has(MultiUpdateLoop):
        raise OptionError(f"{target.name} cannot be ejected: the steps of a MultiUpdateLoop have several updates.")
    fragments, steps = dict(make_fragments(target)), make_steps(target)
    if "loss_func" in steps.source:
        loss = make_loss(target)
        loss.add(steps.copies)
        steps.copies = loss
    body = "\n\n\n".join(
        part.strip("\n")
        for part in (
            make_constants(target, fragments, steps),
            make_parts(target),
            steps.source,
            *dict.fromkeys(fragment.definitions for fragment in fragments.values()),
            fill_functions(target, fragments, steps),
        )
        if part
    )
    check_names(target, body)
    given = steps.copies.imports.union(*(fragment.imports for fragment in fragments.values()))
    notes = [*steps.notes, *left_out(target), *(note for part in fragments.values() for note in part.notes)]
    if idle := [f"`{name}`" for name, fragment in fragments.items() if fragment == Fragment()]:
        notes.append(f"These mixins change nothing, with the options that they have: {', '.join(idle)}.")
    return f"{make_docstring(target, notes, body)}\n\n{import_block(body, given)}\n\n{body}\n"


def make_fragments(target: Target) -> Iterator[tuple[str, Fragment]]:
    """Yield the fragments of mixins and callbacks, by the names of their classes."""
    for mixin, make in MIXINS.items():
        if target.has(mixin):
            yield mixin.__name__, make(target)
    for callback in target.callbacks:
        if type(callback) in CALLBACKS:
            yield type(callback).__name__, CALLBACKS[type(callback)](target, callback)


def check_names(target: Target, body: str) -> None:
    """Raise `OptionError` if a copy of the user's code has a name that the script has for something else."""
    defined = Counter(re.findall(r"^(?:def |class )?(\w+)(?: = |\(|:$)", body, re.MULTILINE))
    if repeated := [f"`{name}`" for name, count in defined.items() if count > 1]:
        raise OptionError(
            f"{target.name} cannot be ejected: a script defines {', '.join(repeated)}, and so would a copy of your "
            "code. Rename that option, function or constant."
        )


# ---- the head


def make_constants(target: Target, fragments: Mapping[str, Fragment], steps: StepFunctions) -> str:
    """Return the constants, those of each mixin below its name."""
    groups = {name: fragment.constants for name, fragment in fragments.items()}
    options = {name for mixin in MIXINS if target.has(mixin) for name in mixin.__annotations__}
    defined = {name for constants in groups.values() for name in constants}
    own = {name for name in steps.copies.options if name not in options or name.upper() not in defined}
    groups[target.cls.__name__] = {name.upper(): target.option(name) for name in sorted(own)}
    lines = ["NUM_EPOCHS = 1", "BATCH_SIZE = 8  # of one process", 'WEIGHTS = "weights.pt"']
    if not any("SEED" in constants for constants in groups.values()):
        lines.append("SEED = 0  # of the weights and the order of the data")
    for name, constants in groups.items():
        if constants:
            lines += ["", f"# {name}"]
            lines += (assignment(key, value if is_plain(value) else Code("...")) for key, value in constants.items())
    batch = "tuple[Tensor, Tensor]  # inputs and targets" if target.has(Trainer) else "Any"
    return "\n".join([*lines, "", f"Batch = {batch}"])


def make_docstring(target: Target, notes: list[str], body: str) -> str:
    """Return the docstring of a script: where it comes from, what is to write, and what differs from the trainer."""
    about = (
        f"`ptacc eject {target.name}` wrote it. For the same model, batches and seed, its losses on one process equal "
        "those of the trainer to the last bit, apart from what is listed below."
    )
    order = (
        "The order of the data is that of torch's `shuffle=True`. On several processes, Accelerate repeats samples in "
        "training to fill the last batch."
    )
    unwritten = ", ".join(f"`{name or constant}`" for name, constant in UNWRITTEN.findall(body))
    paragraphs = [about, f"To write: {unwritten}." if unwritten else "", "Differences from the trainer:"]
    listed = [textwrap.fill(f"- {note}", WIDTH, subsequent_indent="  ") for note in (order, *notes)]
    texts = [f'"""{target.cls.__name__} as a script for PyTorch and Accelerate.']
    texts += [textwrap.fill(paragraph, WIDTH) for paragraph in paragraphs if paragraph]
    return "\n\n".join([*texts, "\n".join(listed)]) + '\n"""'


def left_out(target: Target) -> Iterator[str]:
    """Yield what is left out of the trainer: mixins, callbacks, and hooks of the user's own classes."""
    for mixin, text in LEFT_OUT.items():
        if target.has(mixin):
            yield f"`{mixin.__name__}` is left out: {text}"
    for callback in target.callbacks:
        if type(callback) not in CALLBACKS and not isinstance(callback, REPLACED_CALLBACKS):
            yield f"The callback `{type(callback).__name__}` is left out."
    if target.option("history_file") is not None:
        yield "`history_file` is left out."
    if target.trainer is not None:
        yield from unusual_parts(target.trainer)
    for cls in target.cls.__mro__:
        if not is_ours(cls) and (names := own_hooks(target.cls, cls)):
            yield f"Hooks of `{cls.__name__}` are left out: {', '.join(f'`{name}`' for name in names)}."


def unusual_parts(trainer: TrainerCore) -> Iterator[str]:
    """Yield what a model or an optimizer needs that a script does not do."""
    model = trainer.unwrapped_model
    if model.training and (names := list(find_eval_roots(model))):
        yield f"Submodules that are in eval mode are trained: {', '.join(f'`{name}`' for name in names)}."
    if any(isinstance(slot.optimizer, HasModes) for slot in trainer.optimizer_slots()):
        yield "The `train` and `eval` of the optimizer are not called."


def is_ours(cls: type) -> bool:
    """Return whether a class is of this library, and not a ready trainer."""
    return cls.__module__.partition(".")[0] == "ptacc" and cls.__module__ != "ptacc.trainers"


def own_hooks(trainer: type[TrainerCore], cls: type) -> list[str]:
    """Return the hooks that a class of the user overrides, without those that the script has as functions."""
    options = {option.name for option in dataclasses.fields(trainer)}
    overridden = {name for base in trainer.__mro__ if is_ours(base) for name in vars(base) if name[0] != "_"}
    return [name for name in vars(cls) if name in overridden - options - {*HOOKS} and not HAS_NO_PLACE.search(name)]


# ---- the functions


def fill_functions(target: Target, fragments: Mapping[str, Fragment], steps: StepFunctions) -> str:
    """Return the functions of evaluation and training."""
    texts = {
        place.name: "\n".join(filter(None, (getattr(fragment, place.name) for fragment in fragments.values())))
        for place in dataclasses.fields(Fragment)
        if isinstance(place.default, str)
    }
    texts["accelerator"] = make_accelerator([text for part in fragments.values() for text in part.accelerator])
    averages = target.has(EMAMixin)
    model = "evaluated" if averages and target.option("ema_evaluates") else "accelerator.unwrap_model(model)"
    texts["returned"] = f"return {'average' if averages else 'original'}, history"
    texts["signature"] = "def evaluate(model: nn.Module, loader: DataLoader) -> dict[str, float]:"
    texts["evaluation"] = f"values |= evaluate({model}, eval_loader)"
    if texts["parameters"]:
        parameters = "".join(
            f"    {name},\n" for name in ("model: nn.Module", "loader: DataLoader", texts["parameters"])
        )
        texts["signature"] = f"def evaluate(\n{parameters}) -> dict[str, float]:"
        texts["evaluation"] = f"values |= evaluate({model}, eval_loader, metrics)"
    is_window = accumulated_steps(target) > 1
    texts["step_end"] = (RECORD_WINDOW if is_window else RECORD) + texts["step_end"]
    if target.has(AMPMixin) and target.option("mixed_precision") == "fp16":
        step_end = textwrap.indent(texts["step_end"], "    ")
        texts["step_end"] = f"if not accelerator.optimizer_step_was_skipped:\n{step_end}"
    texts["batches"] = fill(WINDOW if is_window else BATCH, texts)
    source = fill(FUNCTIONS, texts)
    for kind, name, place in (("train", steps.train, "batch_end"), ("eval", steps.evaluate, "eval_batch")):
        outputs = "outputs" if "outputs" in texts[place] else "_"
        source = source.replace(f"loss, outputs = {kind}_step(", f"loss, {outputs} = {name}(")
    return source


def make_accelerator(arguments: list[str]) -> str:
    """Return the statement that makes the accelerator."""
    if len(arguments) < 2 and "\n" not in "".join(arguments):
        return f"accelerator = Accelerator({''.join(arguments)})"
    lines = "".join(textwrap.indent(f"{argument},\n", "    ") for argument in arguments)
    return f"accelerator = Accelerator(\n{lines})"
