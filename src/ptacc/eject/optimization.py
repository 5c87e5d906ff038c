"""Fragments of the mixins that change how weights are updated."""

from __future__ import annotations

import inspect
from typing import Any, get_type_hints

from ptacc.core.hooks import TrainerCore
from ptacc.eject.copying import Copies, NotCopiedError, copy_function
from ptacc.eject.fragment import Fragment, Target
from ptacc.eject.literals import Code, literal
from ptacc.engines.base import all_parameters
from ptacc.mixins.grad_accum import GradAccumMixin
from ptacc.types.monitor import as_monitor

MAKE_WINDOWS = '''\
def make_windows(loader: DataLoader, size: int) -> Iterator[list[Batch]]:
    """Group the batches of an epoch by `size`. The last group may be smaller."""
    batches = iter(loader)
    while window := list(islice(batches, size)):
        yield window
'''


def accumulated_steps(target: Target) -> int:
    """Return the number of batches of a step."""
    return int(target.option("gradient_accumulation_steps")) if target.has(GradAccumMixin) else 1


def grad_accum(target: Target) -> Fragment:
    """Return the fragment of `GradAccumMixin`."""
    is_scheduled = bool(target.option("accumulation_schedule"))
    notes = ("`GradAccumMixin(accumulation_schedule=...)`: steps have the first number of batches until the end.",)
    steps = accumulated_steps(target)
    return Fragment(
        constants={"GRADIENT_ACCUMULATION_STEPS": steps} if steps > 1 else {},
        definitions=MAKE_WINDOWS if steps > 1 else "",
        notes=notes if is_scheduled else (),
    )


def grad_clip(target: Target) -> Fragment:
    """Return the fragment of `GradClipMixin`."""
    norm, value = target.option("max_grad_norm"), target.option("max_grad_value")
    given = [name for name in ("max_grad_deviations", "max_loss_deviations") if target.option(name) is not None]
    action = target.option("spike_action")
    notes = [f"`GradClipMixin({name}=..., spike_action={literal(action)})`: spikes are not noticed." for name in given]
    if norm is None and value is None:
        return Fragment(notes=notes)
    is_usual = target.trainer is None or trains_all(target.trainer)
    parameters = "model.parameters()" if is_usual else "trained"
    ready = ["# GradClipMixin: limit the gradients of the step."]
    if value is not None:
        ready.append(f"accelerator.clip_grad_value_({parameters}, MAX_GRAD_VALUE)")
    if norm is not None:
        # Accelerate unscales gradients in each call, and may do so once a step.
        clip = "accelerator.clip_grad_norm_" if value is None else "nn.utils.clip_grad_norm_"
        ready.append(f"grad_norm = {clip}({parameters}, MAX_GRAD_NORM)")
    limits = {"MAX_GRAD_NORM": norm, "MAX_GRAD_VALUE": value}
    return Fragment(
        constants={name: limit for name, limit in limits.items() if limit is not None},
        notes=notes,
        prepared="" if is_usual else 'trained = [p for group in optimizer.param_groups for p in group["params"]]',
        epoch_start="" if norm is None else "grad_norms = []",
        gradients_ready="\n".join(ready),
        step_end="" if norm is None else "grad_norms.append(grad_norm)",
        values="" if norm is None else 'values["grad_norm"] = torch.stack(grad_norms).mean().item()',
    )


def trains_all(trainer: TrainerCore) -> bool:
    """Return whether the optimizers have all parameters of the model, in their order."""
    trained = all_parameters(trainer.optimizer_slots())
    return list(map(id, trained)) == list(map(id, trainer.unwrapped_model.parameters()))


RUN_PLAN = '''\
@dataclass
class RunPlan:
    """The length of the run. Steps are those of the optimizer."""

    total_steps: int
    steps_per_epoch: int
    num_epochs: int
'''
CREATE_SCHEDULER = '''\
def create_scheduler(optimizer: Optimizer, plan: RunPlan) -> LRScheduler:
    """Return the learning-rate schedule."""
    raise NotImplementedError("write create_scheduler")
'''


def lr_scheduler(target: Target) -> Fragment:
    """Return the fragment of `LRSchedulerMixin`."""
    create = target.option("create_scheduler")
    notes = ["`create_scheduler_of` is left out."] if target.option("create_scheduler_of") else []
    try:
        copied = copy_function(create, "create_scheduler")
    except NotCopiedError as error:
        notes += [] if isinstance(create, Code) else [f"The schedule is not copied: {error}."]
        copied = Copies({"create_scheduler": CREATE_SCHEDULER}, {"from torch.optim.lr_scheduler import LRScheduler"})
    steps = "len(train_loader)"
    if accumulated_steps(target) > 1:
        steps = f"math.ceil({steps} / GRADIENT_ACCUMULATION_STEPS)"
    step, place = "scheduler.step()", "step_end" if target.option("scheduler_interval") == "step" else "epoch_end"
    if steps_on_values(create):
        monitor = as_monitor(target.option("scheduler_monitor"))
        step, place = f"scheduler.step(values[{literal(monitor.name)}])", "evaluation_end"
    return Fragment(
        imports=copied.imports,
        definitions=f"{RUN_PLAN}\n\n{copied.source}",
        notes=notes,
        plan=(
            "# LRSchedulerMixin: a schedule of this run.\n"
            f"steps_per_epoch = {steps}\n"
            "plan = RunPlan(NUM_EPOCHS * steps_per_epoch, steps_per_epoch, NUM_EPOCHS)\n"
            "scheduler = create_scheduler(optimizer, plan)"
        ),
        step_end=step if place == "step_end" else "",
        evaluation_end=step if place == "evaluation_end" else "",
        epoch_end=step if place == "epoch_end" else "",
    )


def steps_on_values(create: Any) -> bool:
    """Return whether a function is annotated to return a scheduler whose `step` takes a value."""
    try:
        kind = get_type_hints(create).get("return")
        first = list(inspect.signature(kind.step).parameters.values())[1]  # type: ignore[union-attr]
    except (AttributeError, IndexError, NameError, TypeError):
        return False
    return first.default is inspect.Parameter.empty
