"""The functions of a script that compute losses: those of the trainer's class."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from ptacc.core.batch_hooks import BatchHooks
from ptacc.eject.catalog import LEFT_OUT, MIXINS
from ptacc.eject.copying import Copies, Method, NotCopiedError, copy_function
from ptacc.eject.fragment import Target
from ptacc.loop.loop import TrainingLoop
from ptacc.trainers.supervised import Trainer

STEP_OF_A_TRAINER = '''\
def {name}(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss of a batch{where}, and the outputs."""
    inputs, targets = batch
    outputs = model(inputs)
    return {loss}(outputs, targets), outputs
'''
STEP_OUTPUT = '''\
class StepOutput(NamedTuple):
    """The loss of a batch, and the outputs."""

    loss: Tensor
    outputs: Any = None
'''
COUNT_ITEMS = '''\
def count_items(batch: Batch) -> int:
    """Return what the loss of a batch is a mean over: samples, if it ignores none."""
    return find_batch_size(batch)
'''
HOOKS = {
    "compute_train_loss": "(outputs: Tensor, targets: Tensor) -> Tensor",
    "compute_eval_loss": "(outputs: Tensor, targets: Tensor) -> Tensor",
    "train_step": "(model: nn.Module, batch: Batch) -> tuple[Tensor, Any]",
    "eval_step": "(model: nn.Module, batch: Batch) -> tuple[Tensor, Any]",
    "count_items": "(batch: Batch) -> int",
}
"""The hooks that become functions, each with the parameters of the function that is to write if it is not copied."""
WRITTEN = (Trainer, TrainingLoop, BatchHooks)
"""The classes whose hooks are written here."""
LOSSES = {name: name for name in ("loss_func", "compute_train_loss", "compute_eval_loss")}


@dataclass
class StepFunctions:
    """The functions that compute losses.

    Args:
        copies: Copies of the user's functions.
        sources: Other functions, and those that the user has to write.
        train: The function for batches of training.
        evaluate: The function for batches of evaluations.
        notes: What was not copied, and why.
        overridden: The hooks that are not those of this library.
    """

    copies: Copies = field(default_factory=Copies)
    sources: list[str] = field(default_factory=list)
    train: str = "train_step"
    evaluate: str = "eval_step"
    notes: list[str] = field(default_factory=list)
    overridden: list[str] = field(default_factory=list)

    @property
    def source(self) -> str:
        """The source of all functions."""
        output = [STEP_OUTPUT] if "StepOutput" in self.copies.ours else []
        return "\n\n".join([*output, *self.copies.sources.values(), *self.sources])


def make_steps(target: Target) -> StepFunctions:
    """Copy the hooks of a trainer's class that compute losses, and write those of this library."""
    steps = StepFunctions()
    options = frozenset(option.name for option in dataclasses.fields(target.cls)) - {"model", "optimizer"}
    for name, signature in HOOKS.items():
        owner = find_owner(target.cls, name)
        if owner is None or owner in WRITTEN:
            continue
        steps.overridden.append(name)
        method = Method("", LOSSES, options)
        if name.endswith("_step"):
            method = Method("model, ", {"model": "model", "forward": "model", **LOSSES}, options)
        try:
            steps.copies.add(copy_function(vars(owner)[name], name, method))
        except NotCopiedError as error:
            steps.sources.append(f'def {name}{signature}:\n    raise NotImplementedError("write {name}")\n')
            steps.notes.append(f"`{owner.__name__}.{name}` is not copied: {error}. Write `{name}`.")
    write_steps(target, steps)
    return steps


def find_owner(cls: type, name: str) -> type | None:
    """Return the class whose hook is called first, without mixins of this library."""
    known = {*MIXINS, *LEFT_OUT}
    return next((base for base in cls.__mro__ if name in vars(base) and base not in known), None)


def write_steps(target: Target, steps: StepFunctions) -> None:
    """Write the functions whose hooks are not overridden."""
    if "count_items" not in steps.overridden:
        steps.sources.append(COUNT_ITEMS)
    missing = [kind for kind in ("train", "eval") if f"{kind}_step" not in steps.overridden]
    losses = {kind: f"compute_{kind}_loss" for kind in ("train", "eval")}
    losses = {kind: name if name in steps.overridden else "loss_func" for kind, name in losses.items()}
    if not target.has(Trainer):
        steps.evaluate = "train_step" if "eval" in missing else "eval_step"
    elif len(missing) == 2 and losses["train"] == losses["eval"]:
        steps.train = steps.evaluate = "compute_loss"
        steps.sources.append(STEP_OF_A_TRAINER.format(name="compute_loss", where="", loss="loss_func"))
    else:
        for kind in missing:
            where = " in an evaluation" if kind == "eval" else ""
            steps.sources.append(STEP_OF_A_TRAINER.format(name=f"{kind}_step", where=where, loss=losses[kind]))
