"""The assertion that splitting a step's samples otherwise changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor

from ptacc.errors import DataError, OptionError
from ptacc.loop.evaluation import EvalData, EvalSets
from ptacc.loop.loop import TrainingLoop
from ptacc.rng import preserved_streams
from ptacc.testing.comparison import AnyLoop, Split, Tolerance, TrainingResult, causes, differences, select_tolerance
from ptacc.testing.subset import Subset, check_map_style
from ptacc.types.aliases import BatchT, OutputT, RawT, SampleT
from ptacc.types.protocols import SizedDataset, SupportsGradAccum
from ptacc.validation import check_at_least, check_positive

EPOCHS = 2
WHOLE_WINDOWS = 2
"""Windows of each epoch in front of the ragged one."""


@overload
def assert_split_invariant(
    make_trainer: Callable[[], TrainingLoop[BatchT, OutputT, SampleT]],
    data: SizedDataset[SampleT],
    *,
    eval_dataset: EvalData[SampleT] | EvalSets[SampleT] | None = None,
    window: int = 12,
    rel: float | None = None,
) -> None: ...
@overload
def assert_split_invariant(
    make_trainer: Callable[[], TrainingLoop[BatchT, OutputT, SampleT]],
    data: SizedDataset[RawT],
    *,
    eval_dataset: EvalData[RawT] | EvalSets[RawT] | None = None,
    collate_fn: Callable[[list[RawT]], BatchT],
    window: int = 12,
    rel: float | None = None,
) -> None: ...
def assert_split_invariant(
    make_trainer: Callable[[], AnyLoop],
    data: SizedDataset[Any],
    *,
    eval_dataset: Any = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    window: int = 12,
    rel: float | None = None,
) -> None:
    """Assert that training is the same, but for rounding, however the samples of a step are split into batches.

    Trainers train for two epochs on the first samples of `data`, in their order: two windows and a part of a third an
    epoch. The first trainer takes a window as one batch of `window` samples. The others take it in the `k` batches of
    `b` samples that there are with `b * k == window`. Each step's loss and the weights at the end are compared.

    Whether the trainer has `GradAccumMixin` or not makes no difference: `accumulation_steps` is set from here, and with
    it `gradient_accumulation_steps`, where the trainer has it. Default callbacks and the history file are left out.

    In a launch of several processes, which all call this, a window has `window` samples a process.

    A loss that is no mean over single items is refused, and rightly so: with batch norm, dropout, in-batch negatives,
    or random transforms the split is part of what is trained. Make the trainer without them (`p=0.0`), and the rest is
    still tested. The global generators are left where they were.

    Args:
        make_trainer: Makes a trainer, a new one with the same initial weights at each call: call `torch.manual_seed` in
            it. Prefer float64, and SGD to Adam, which blows up rounding where a gradient consists of nothing else.
        data: At least `window + 1` samples a process; about 2.7 windows of them are taken. Unequal samples, such as
            texts of several lengths, find more mistakes than equal ones.
        eval_dataset: For trainers that need one, such as to stop early. What the evaluations find is not compared.
        collate_fn: As for `train`.
        window: Samples of a process for one step, at least 2; a number with many divisors.
        rel: What passes for rounding, of losses and weights: the relative difference. If not given, 1e-12 for losses
            and 1e-10 for weights in float64, 1e-5 in float32, 0.02 in lower or mixed precision. On GPUs, torch
            computes convolutions of float32 in TF32 by default, whose 10 bits need about 1e-3.

    Raises:
        AssertionError: A loss or a weight depends on the split, or a training fails with one split alone. The message
            names the split, the step or the tensor, both values, and the usual causes.
        OptionError: `make_trainer` makes trainers that differ, `window` is below 2, or `rel` is not above 0.
        DataError: Too few samples, or data without a length and an index.

    Example:
        >>> from ptacc import Trainer
        >>> from ptacc.testing import iris, iris_parts
        >>> assert_split_invariant(lambda: Trainer(**iris_parts()), iris())
    """
    check_at_least("assert_split_invariant", "window", window, 2)
    if rel is not None:
        check_positive("assert_split_invariant", "rel", rel)
    check_map_style("assert_split_invariant", data)
    options: dict[str, Any] = {"eval_dataset": eval_dataset}
    if collate_fn is not None:
        options["collate_fn"] = collate_fn
    with preserved_streams(devices=True):
        compare_splits(make_trainer, data, window, rel, options)


def compare_splits(
    make_trainer: Callable[[], AnyLoop],
    data: SizedDataset[Any],
    window: int,
    rel: float | None,
    options: Mapping[str, Any],
) -> None:
    """Train in every split, and raise `AssertionError` at the first that differs from the whole."""
    trainer = make_trainer()
    replicas = trainer.distributed.replicas
    samples = take_samples(len(data), window * replicas)
    call = {"train_dataset": Subset(data, samples, samples), **options}
    initial = copy_state(trainer)
    whole, *splits = (Split(size, window // size, replicas) for size in divisors(window))
    expected = train(trainer, whole, call)
    tolerance = select_tolerance(trainer) if rel is None else Tolerance(rel, rel)
    for split in splits:
        trainer = make_trainer()
        check_same_start(initial, copy_state(trainer))
        try:
            got = train(trainer, split, call)
        except Exception as error:
            raise AssertionError(
                f"{type(trainer).__name__}: training fails in {split}, and not in {whole}: {type(error).__name__}: "
                f"{error} {causes(trainer)}"
            ) from error
        complaint = next(differences(got, expected, tolerance), None)
        if complaint is not None:
            raise AssertionError(f"{type(trainer).__name__}: {complaint} {causes(trainer)}")


# ---- training


def divisors(window: int) -> list[int]:
    """Return the sizes of batches that a window can be made of, the largest first.

    Example:
        >>> divisors(12)
        [12, 6, 4, 3, 2, 1]
    """
    return [size for size in range(window, 0, -1) if window % size == 0]


def take_samples(available: int, window: int) -> int:
    """Return how many samples to train on, so that the last window of an epoch is ragged.

    Args:
        available: Samples that there are.
        window: Samples of a step, over all processes.

    Raises:
        DataError: There is no whole window and a part of another.

    Example:
        >>> take_samples(1000, 12), take_samples(24, 12), take_samples(20, 12)
        (32, 23, 20)
    """
    # 8 of 12 leave out whole batches of most sizes, and a part of one of the others.
    samples = min(available, WHOLE_WINDOWS * window + min(window // 2 + 2, window - 1))
    if samples % window == 0:
        samples -= 1
    if samples <= window:
        raise DataError(
            f"assert_split_invariant got {available} samples, and needs at least {window + 1}: a whole window and a "
            "part of another. Give more data, or a smaller window."
        )
    return samples


def train(trainer: AnyLoop, split: Split, call: Mapping[str, Any]) -> TrainingResult:
    """Train a fresh trainer in one way of splitting."""
    trainer.default_callbacks, trainer.history_file = (), None
    # On the object, they stand before those of its class: the loop asks the object.
    vars(trainer)["accumulation_steps"] = lambda: split.batches
    vars(trainer)["make_seed"] = lambda: 0  # a loader of the user's may shuffle all the same
    if isinstance(trainer, SupportsGradAccum):
        trainer.gradient_accumulation_steps = split.batches
    history = trainer.train(
        **call,
        num_epochs=EPOCHS,
        per_device_batch_size=split.size,
        train_dataloader_kwargs={"shuffle": False},
        limit_batches=len(call["train_dataset"]),  # or a smoke run's environment variable would cut windows
    )
    parameters = trainer.unwrapped_model.named_parameters()
    return TrainingResult(split, history.steps, {name: copied(parameter) for name, parameter in parameters})


def copy_state(trainer: AnyLoop) -> dict[str, Tensor]:
    """Return copies of all tensors in a model's state."""
    state: Mapping[str, object] = trainer.unwrapped_model.state_dict()
    return {name: copied(value) for name, value in state.items() if isinstance(value, Tensor)}


def copied(tensor: Tensor) -> Tensor:
    """Return a copy on the host."""
    return tensor.detach().to("cpu", copy=True)


def check_same_start(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Raise `OptionError` for two fresh trainers whose models differ."""
    odd = [name for name in {**first, **second} if not (name in first and name in second)]
    odd += [name for name in first if name in second and not torch.equal(first[name], second[name])]
    if odd:
        raise OptionError(
            f"assert_split_invariant(make_trainer=...): two fresh trainers differ in {odd[0]!r}, so that their losses "
            "cannot be compared. Make the model in make_trainer, anew at each call, and call torch.manual_seed(0) "
            "before it is made."
        )
