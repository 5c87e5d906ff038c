"""The assertion that a trainer can learn one batch by heart."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from ptacc.errors import OptionError
from ptacc.loop.evaluation import EvalData, EvalSets
from ptacc.loop.loop import TrainingLoop
from ptacc.rng import preserved_streams
from ptacc.run.history import STEPS_IN_MEMORY
from ptacc.testing.comparison import AnyLoop
from ptacc.testing.subset import Subset, check_map_style
from ptacc.types.aliases import BatchT, OutputT, RawT, SampleT
from ptacc.types.outputs import StepRecord
from ptacc.types.protocols import SizedDataset, Stateful
from ptacc.validation import check_at_least


@overload
def assert_overfits_one_batch(
    trainer: TrainingLoop[BatchT, OutputT, SampleT],
    data: SizedDataset[SampleT],
    *,
    eval_dataset: EvalData[SampleT] | EvalSets[SampleT] | None = None,
    batch_size: int = 8,
    steps: int = 200,
    to: float = 0.1,
) -> None: ...
@overload
def assert_overfits_one_batch(
    trainer: TrainingLoop[BatchT, OutputT, SampleT],
    data: SizedDataset[RawT],
    *,
    eval_dataset: EvalData[RawT] | EvalSets[RawT] | None = None,
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
    collate_fn: Callable[[list[Any]], Any] | None = None,
    batch_size: int = 8,
    steps: int = 200,
    to: float = 0.1,
) -> None:
    """Assert that the loss falls where a trainer sees one batch over and over: it has to learn that by heart.

    What cannot do this learns nothing from more data either. It takes seconds, and finds labels that stand beside
    other inputs, parameters that get no gradient, and learning rates far off.

    This is a check and no training: afterwards the weights, the optimizer's state and the global generators are what
    they were, and the trainer's `run` is the one that it had. Callbacks hear nothing, and nothing is written to the
    history file.

    All steps are one epoch of the run, so that a schedule of epochs stays where it begins. In a launch of several
    processes, which all call this, each has a batch of its own.

    Args:
        trainer: The trainer, ready to train.
        data: Its first samples are the batch.
        eval_dataset: For trainers that need one, such as to stop early.
        collate_fn: As for `train`.
        batch_size: Samples of the batch, at least 1; all of the data where that has fewer.
        steps: Optimizer steps, from 2 to 1,000.
        to: The part of the first step's loss that the last step's has to reach, above 0 and below 1. A loss that
            cannot come near 0, as with smoothed labels, needs a larger one.

    Raises:
        AssertionError: The loss does not fall so far, is NaN or infinite, or does not begin above 0. The message has
            the first and the last loss, and what to look at.
        OptionError: A number out of its range.
        DataError: No samples, or data without a length and an index.

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
        raise OptionError(f"{owner}(steps={steps}): must be at most {STEPS_IN_MEMORY:,}, which a history holds.")
    if not 0 < to < 1:
        raise OptionError(f"{owner}(to={to!r}): must be above 0 and below 1, a part of the first loss.")
    check_map_style(owner, data)
    checked = silent_copy(trainer)
    replicas = checked.distributed.replicas
    size = max(1, min(batch_size, len(data) // replicas))
    samples = min(len(data), size * replicas)
    call: dict[str, Any] = {} if collate_fn is None else {"collate_fn": collate_fn}
    with preserved_streams(devices=True), weights_put_back(checked):
        before = {name: p.detach().to("cpu", copy=True) for name, p in checked.unwrapped_model.named_parameters()}
        history = checked.train(
            Subset(data, samples, size * replicas * checked.accumulation_steps() * steps),
            eval_dataset,
            max_steps=steps,
            per_device_batch_size=size,
            train_dataloader_kwargs={"shuffle": False},
            limit_batches=checked.accumulation_steps() * steps,  # or a smoke run's environment variable would end it
            **call,
        )
        complaint = what_is_wrong(history.steps, to)
        if complaint:
            ended = f" The run was ended: {history.stop_reason}." if history.stop_reason else ""
            raise AssertionError(
                f"{type(trainer).__name__}, on one batch of {size} samples: {complaint}{ended} "
                f"{to_look_at(checked, before, history.steps)}"
            )


def silent_copy(trainer: AnyLoop) -> AnyLoop:
    """Return a trainer of the same model and optimizer whose run is its own, and heard by nobody."""
    copied = copy.copy(trainer)
    copied.callbacks = copied.default_callbacks = ()
    copied.history_file = None
    return copied


@contextlib.contextmanager
def weights_put_back(trainer: AnyLoop) -> Iterator[None]:
    """Put the states of the model and the optimizers back after the block."""
    holders: list[Stateful] = [trainer.unwrapped_model, *(slot.optimizer for slot in trainer.optimizer_slots())]
    states = [copy.deepcopy(holder.state_dict()) for holder in holders]
    try:
        yield
    finally:
        for holder, state in zip(holders, states, strict=True):
            holder.load_state_dict(state)


def what_is_wrong(steps: Sequence[StepRecord], to: float) -> str:
    """Say what is wrong with the losses of some steps, empty if nothing is."""
    first, last = steps[0].loss, steps[-1].loss
    for step in steps:
        if not math.isfinite(step.loss):
            began = f"began at {first:.4g} and " if step is not steps[0] else ""
            return f"the loss {began}is {step.loss} at step {step.step}."
    if first <= 0:
        return f"the loss begins at {first:.4g}, and a part of what is not above 0 says nothing. Add a constant to it."
    if last > to * first:
        return f"the loss began at {first:.4g} and is {last:.4g} at step {steps[-1].step}, not below {to * first:.4g}."
    return ""


def to_look_at(trainer: AnyLoop, before: Mapping[str, Tensor], steps: Sequence[StepRecord]) -> str:
    """Say what to look at where a loss does not fall, with what is known of it."""
    parameters = dict(trainer.unwrapped_model.named_parameters())
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    still = [name for name in parameters if name not in frozen and torch.equal(before[name], parameters[name].cpu())]
    return (
        f"Look at the learning rate ({steps[0].learning_rate:g} in the first step, {steps[-1].learning_rate:g} in the "
        f"last); at trainable parameters that did not change, because they get no gradient or the optimizer does not "
        f"hold them ({in_short(still)}); at frozen ones ({in_short(frozen)}); and at the labels: does each belong to "
        "its input, or are they shifted by one?"
    )


def in_short(names: Sequence[str]) -> str:
    """Write a few names, and how many more there are.

    Example:
        >>> in_short(list("abcdefg")), in_short([])
        ('a, b, c, d, e and 2 more', 'none')
    """
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more if names else "none"
