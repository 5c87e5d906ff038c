"""The assertion that a trainer can overfit one batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from ptacc.errors import OptionError
from ptacc.loop.evaluation import AnyEval
from ptacc.loop.loop import TrainingLoop
from ptacc.run.history import STEPS_IN_MEMORY
from ptacc.testing.comparison import copy_tensors
from ptacc.tuning.isolated import AnyLoop, check_map_style, isolated_copy, repeat
from ptacc.types.accumulation import as_accumulation
from ptacc.types.aliases import BatchT, OutputT, RawT, SampleT
from ptacc.types.outputs import StepRecord
from ptacc.types.protocols import SizedDataset
from ptacc.validation import check_at_least, list_some


@overload
def assert_overfits_one_batch(
    trainer: TrainingLoop[BatchT, OutputT, nn.Module, SampleT],
    data: SizedDataset[SampleT],
    *,
    eval_dataset: AnyEval[SampleT] = None,
    batch_size: int = 8,
    steps: int = 200,
    to: float = 0.1,
) -> None: ...
@overload
def assert_overfits_one_batch(
    trainer: TrainingLoop[BatchT, OutputT, nn.Module, SampleT],
    data: SizedDataset[RawT],
    *,
    eval_dataset: AnyEval[RawT] = None,
    collate_fn: Callable[[list[RawT]], BatchT],
    batch_size: int = 8,
    steps: int = 200,
    to: float = 0.1,
) -> None: ...
def assert_overfits_one_batch(
    trainer: AnyLoop,
    data: SizedDataset[Any],
    *,
    eval_dataset: Any = None,
    collate_fn: Any = None,
    batch_size: int = 8,
    steps: int = 200,
    to: float = 0.1,
) -> None:
    """Assert that a trainer can overfit one batch: its loss falls when every step trains on the same samples.

    A trainer that fails this check will not learn from more data either. The check takes seconds. It finds labels that
    do not belong to their inputs, parameters that get no gradient, and learning rates that are far off.

    Afterwards the weights, the optimizer's state and the global generators have their former state, and `trainer.run`
    is the same object. No callback is called, nothing is written, and nothing stops the training early.

    All steps belong to one epoch, so a schedule that steps once an epoch stays at its first value. In a launch of
    several processes, which all call this function, each process has its own batch.

    Args:
        trainer: The trainer, ready to train.
        data: The batch consists of its first samples.
        eval_dataset: Needed if a schedule follows an evaluated value.
        collate_fn: As for `train`.
        batch_size: Samples of the batch, at least 1. A smaller dataset is used in full.
        steps: Optimizer steps, from 2 to 1,000.
        to: The last step's loss has to be at most this fraction of the first step's loss. Above 0 and below 1. A loss
            whose minimum is not 0, as with smoothed labels, needs a larger value.

    Raises:
        AssertionError: The loss does not fall that far, is NaN or infinite, or does not start above 0. The message
            contains the first and the last loss, and what to check.
        OptionError: A number is out of its range.
        DataError: No samples, or data without a length and an index.
        NestedRunError: The trainer is running.

    Source: "overfit one batch" in A. Karpathy, "A Recipe for Training Neural Networks" (2019),
    https://karpathy.github.io/2019/04/25/recipe/.

    Example:
        >>> from ptacc import Trainer
        >>> from ptacc.testing import iris, iris_parts
        >>> assert_overfits_one_batch(Trainer(**iris_parts()), iris())
    """
    owner = "assert_overfits_one_batch"
    check_at_least(owner, "batch_size", batch_size, 1)
    check_at_least(owner, "steps", steps, 2)
    if steps > STEPS_IN_MEMORY:
        raise OptionError(
            f"{owner}(steps={steps}): must be at most {STEPS_IN_MEMORY:,}, the steps that a history keeps."
        )
    if not 0 < to < 1:
        raise OptionError(f"{owner}(to={to!r}): must be above 0 and below 1, a fraction of the first loss.")
    check_map_style(owner, "data", data)
    with isolated_copy(trainer, data, eval_dataset) as trial:
        replicas, num_batches = trial.distributed.replicas, as_accumulation(trial.accumulation_steps()).largest * steps
        size = max(1, min(batch_size, len(data) // replicas))
        before = copy_tensors(trial.trained_modules.named_parameters())
        history = trial.train(
            repeat(data, min(len(data), size * replicas), size * replicas * num_batches),
            eval_dataset,
            max_steps=steps,
            per_device_batch_size=size,
            train_dataloader_kwargs={"shuffle": False},
            limit_batches=num_batches,  # overrides the environment variable of smoke runs
            collate_fn=collate_fn,
        )
        problem = describe_problem(history.steps, to)
        if problem:
            ended = f" The run was stopped: {history.stop_reason}." if history.stop_reason else ""
            raise AssertionError(
                f"{type(trainer).__name__}, on one batch of {size} samples: {problem}{ended} "
                f"{describe_checks(trial, before, history.steps)}"
            )


def describe_problem(steps: Sequence[StepRecord], to: float) -> str:
    """Describe what is wrong with the losses of some steps; empty if nothing is."""
    first, last = steps[0].loss, steps[-1].loss
    for step in steps:
        if not math.isfinite(step.loss):
            began = f"began at {first:.4g} and " if step is not steps[0] else ""
            return f"the loss {began}is {step.loss} at step {step.step}."
    if first <= 0:
        return f"the loss begins at {first:.4g}, so it cannot fall to a fraction of that. Add a constant to it."
    if last > to * first:
        return f"the loss began at {first:.4g} and is {last:.4g} at step {steps[-1].step}, not below {to * first:.4g}."
    return ""


def describe_checks(trainer: AnyLoop, before: Mapping[str, Tensor], steps: Sequence[StepRecord]) -> str:
    """Describe what to check when a loss does not fall, with the trainer's own rates and parameters."""
    parameters = dict(trainer.trained_modules.named_parameters())
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    unchanged = [n for n in parameters if n not in frozen and torch.equal(before[n], parameters[n].cpu())]
    listed = [list_some(names, most=5) or "none" for names in (unchanged, frozen)]
    return (
        f"Check the learning rate ({steps[0].learning_rate:g} in the first step, {steps[-1].learning_rate:g} in the "
        f"last); trainable parameters that did not change, because they get no gradient or the optimizer does not "
        f"hold them ({listed[0]}); frozen ones ({listed[1]}); and the labels: does each belong to its input, or are "
        "they shifted by one?"
    )
