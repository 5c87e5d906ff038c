"""The losses of random compositions in plain PyTorch."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ptacc import RunPlan
from tests.fuzz.cases import Case
from tests.fuzz.parts import MAX_NORM, MAX_VALUE, SCHEDULES, make_model, make_optimizers
from tests.fuzz.trainers import Batch, first_trained


def plain_losses(
    case: Case,
    windows: Iterable[list[Batch]],
    epochs: Iterable[int],
    spikes: Iterable[bool],
    random: Tensor,
    planned_steps: int | None,
) -> list[float]:
    """Train on the same batches in plain PyTorch, and return the loss of each step.

    Args:
        case: The composition.
        windows: The batches of each step, of all ranks.
        epochs: The epoch of each step, counted from 1.
        spikes: Whether the update of each step is skipped.
        random: The state of torch's generator before the first step.
        planned_steps: The length of the run for schedules, None if it is unknown.
    """
    model = make_model(case.model)
    if "bf16" in case.mixins:
        model.float()
    optimizers = make_optimizers(model, case.optimizer, several=case.updates != "one")
    plan = RunPlan.compute(num_epochs=None, steps_per_epoch=None, max_steps=planned_steps)
    create, frozen = SCHEDULES[case.schedule], first_trained(model)
    schedulers = [] if create is None else [create(optimizer, plan) for optimizer in optimizers.values()]
    torch.set_rng_state(random)
    losses = []
    for batches, epoch, is_spike in zip(windows, epochs, spikes, strict=True):
        frozen.requires_grad_(epoch != case.freeze_at)
        updates = [[optimizer] for optimizer in optimizers.values()]
        if case.updates != "alternating":
            updates = [[] if is_spike else [*optimizers.values()]]
        losses.append(sum(update(case, model, batches, stepped) for stepped in updates))
        for scheduler in schedulers:
            scheduler.step()
    return losses


def update(case: Case, model: nn.Module, batches: list[Batch], stepped: list[Optimizer]) -> float:
    """Make an update on the batches of a step, and return its loss."""
    items, total = sum(len(targets) for _, targets in batches), 0.0
    autocast: Any = torch.autocast("cpu", torch.bfloat16) if "bf16" in case.mixins else nullcontext()
    model.zero_grad()
    for inputs, targets in batches:
        with autocast:
            loss = nn.functional.cross_entropy(model(inputs), targets) * (len(targets) / items)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    groups = [group for optimizer in stepped for group in optimizer.param_groups]
    parameters = [parameter for group in groups for parameter in group["params"] if parameter.grad is not None]
    if "clip_norm" in case.mixins:
        nn.utils.clip_grad_norm_(parameters, MAX_NORM)
    if "clip_value" in case.mixins and parameters:
        nn.utils.clip_grad_value_(parameters, MAX_VALUE)
    for optimizer in stepped:
        optimizer.step()
    return total
