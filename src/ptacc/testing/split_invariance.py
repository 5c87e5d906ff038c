"""The assertion that training does not depend on how a step is split into batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

from ptacc.errors import DataError, OptionError
from ptacc.loop.evaluation import AnyEval
from ptacc.loop.loop import TrainingLoop
from ptacc.rng import preserved_streams
from ptacc.testing.comparison import (
    BatchSplit,
    Tolerance,
    TrainingResult,
    copy_tensors,
    describe_causes,
    find_differences,
    select_tolerance,
)
from ptacc.tuning.isolated import AnyLoop, check_map_style, isolated_copy, repeat
from ptacc.types.aliases import BatchT, OutputT, RawT, SampleT
from ptacc.types.protocols import SizedDataset, SupportsGradAccum
from ptacc.validation import check_at_least, check_positive


@overload
def assert_split_invariant(
    make_trainer: Callable[[], TrainingLoop[BatchT, OutputT, nn.Module, SampleT]],
    data: SizedDataset[SampleT],
    *,
    eval_dataset: AnyEval[SampleT] = None,
    window: int = 12,
    rel: float | None = None,
) -> None: ...
@overload
def assert_split_invariant(
    make_trainer: Callable[[], TrainingLoop[BatchT, OutputT, nn.Module, SampleT]],
    data: SizedDataset[RawT],
    *,
    eval_dataset: AnyEval[RawT] = None,
    collate_fn: Callable[[list[RawT]], BatchT],
    window: int = 12,
    rel: float | None = None,
) -> None: ...
def assert_split_invariant(
    make_trainer: Callable[[], AnyLoop],
    data: SizedDataset[Any],
    *,
    eval_dataset: Any = None,
    collate_fn: Any = None,
    window: int = 12,
    rel: float | None = None,
) -> None:
    """Assert that training does not depend on how the samples of a step are split into batches, except for rounding.

    The trainer is trained several times, for two epochs on the first samples of `data`, in order. Each epoch has two
    full windows and an incomplete third one; a window is the samples of one step. The first training takes a window as
    one batch of `window` samples. The others take it as `k` batches of `b` samples, for all `b * k == window`. The loss
    of each step and the final weights are compared.

    The trainer need not have `GradAccumMixin`: this function sets `accumulation_steps`, and also
    `gradient_accumulation_steps` if the trainer has it. It trains isolated copies: no callback is called, nothing is
    written, and nothing stops a training early. The global generators keep their state.

    In a launch of several processes, which all call this function, a window has `window` samples on each process.

    A loss that is not a mean over independent items fails, and this is correct: batch norm, dropout, in-batch
    negatives and random transforms make the split a part of what is trained. Make the trainer without them (`p=0.0`)
    to test the rest.

    Args:
        make_trainer: Returns a trainer with the same initial weights at each call: it calls `torch.manual_seed`.
            Prefer float64 to lower precisions, and SGD to Adam, which amplifies a gradient that is only rounding.
        data: At least `window + 1` samples for each process; about 2.7 windows of them are used. Samples of unequal
            size, such as texts of several lengths, find more mistakes than equal ones.
        eval_dataset: Needed if a schedule follows an evaluated value. Results of evaluations are not compared.
        collate_fn: As for `train`.
        window: Samples of one step on each process, at least 2. Choose a number with many divisors.
        rel: The relative difference of losses and weights that counts as rounding. By default 1e-12 for losses and
            1e-10 for weights in float64, 1e-5 in float32, and 0.02 in lower or mixed precision. On GPUs, torch
            computes convolutions of float32 in TF32 by default, whose 10-bit significand needs about 1e-3.

    Raises:
        AssertionError: A loss or a weight depends on the split, or training fails with only some of the splits. The
            message contains the split, the step or the tensor, both values, and the usual causes.
        OptionError: The trainers of `make_trainer` differ, `window` is below 2, or `rel` is not above 0.
        DataError: Too few samples, or data without a length and an index.
        NestedRunError: The trainer is running.

    Example:
        >>> from ptacc import Trainer
        >>> from ptacc.testing import iris, iris_parts
        >>> assert_split_invariant(lambda: Trainer(**iris_parts()), iris())
    """
    owner = "assert_split_invariant"
    check_at_least(owner, "window", window, 2)
    if rel is not None:
        check_positive(owner, "rel", rel)
    check_map_style(owner, "data", data)
    with preserved_streams():
        trainer = make_trainer()
        with preserved_streams(trainer.device):
            options = {"eval_dataset": eval_dataset, "collate_fn": collate_fn}
            compare_splits(trainer, make_trainer, data, window, rel, options)


def compare_splits(
    trainer: AnyLoop,
    make_trainer: Callable[[], AnyLoop],
    data: SizedDataset[Any],
    window: int,
    rel: float | None,
    options: Mapping[str, Any],
) -> None:
    """Train with each split, and raise `AssertionError` at the first one that differs from a single batch.

    The first one is trained with `trainer`, the others with trainers that `make_trainer` returns.
    """
    replicas = trainer.distributed.replicas
    samples = count_samples(len(data), window * replicas)
    initial = copy_tensors(trainer.unwrapped_model.state_dict().items())
    sizes = (size for size in range(window, 0, -1) if window % size == 0)
    unsplit, *splits = (BatchSplit(size, window // size, replicas) for size in sizes)
    expected = train_split(trainer, unsplit, data, samples, options)
    tolerance = select_tolerance(trainer) if rel is None else Tolerance(rel, rel)
    for split in splits:
        trainer = make_trainer()
        check_same_start(initial, copy_tensors(trainer.unwrapped_model.state_dict().items()))
        try:
            got = train_split(trainer, split, data, samples, options)
        except Exception as error:
            raise AssertionError(
                f"{type(trainer).__name__}: training fails in {split}, and not in {unsplit}: {type(error).__name__}: "
                f"{error} {describe_causes(trainer)}"
            ) from error
        difference = next(find_differences(got, expected, tolerance), None)
        if difference is not None:
            raise AssertionError(f"{type(trainer).__name__}: {difference} {describe_causes(trainer)}")


def count_samples(available: int, window: int) -> int:
    """Return the number of samples of an epoch: two full windows, or one if there are too few, and part of another.

    Example:
        >>> count_samples(1000, 12), count_samples(24, 12), count_samples(20, 12)
        (32, 23, 20)
    """
    # With 8 of 12 samples, the last window lacks whole batches of most sizes, and a part of a batch of the others.
    samples = min(available, 2 * window + min(window // 2 + 2, window - 1))
    if samples % window == 0:
        samples -= 1
    if samples <= window:
        raise DataError(
            f"assert_split_invariant got {available} samples, and needs at least {window + 1}: a full window and a "
            "part of another. Give more data, or a smaller window."
        )
    return samples


def train_split(
    trainer: AnyLoop, split: BatchSplit, data: SizedDataset[Any], samples: int, options: Mapping[str, Any]
) -> TrainingResult:
    """Train an isolated copy of a trainer with one split."""
    with isolated_copy(trainer, data, options["eval_dataset"]) as trial:
        vars(trial)["accumulation_steps"] = lambda: split.batches
        if isinstance(trial, SupportsGradAccum):
            trial.gradient_accumulation_steps = split.batches
        history = trial.train(
            train_dataset=repeat(data, samples, samples),
            **options,
            num_epochs=2,
            per_device_batch_size=split.size,
            train_dataloader_kwargs={"shuffle": False},
            limit_batches=samples,  # overrides the environment variable of smoke runs
        )
        return TrainingResult(split, history.steps, copy_tensors(trial.trained_modules.named_parameters()))


def check_same_start(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Raise `OptionError` if the models of two fresh trainers differ."""
    different = [name for name in {**first, **second} if not (name in first and name in second)]
    different += [name for name in first if name in second and not torch.equal(first[name], second[name])]
    if different:
        raise OptionError(
            f"assert_split_invariant(make_trainer=...): two fresh trainers differ in {different[0]!r}, so their losses "
            "cannot be compared. Make the model in make_trainer, and call torch.manual_seed(0) before that."
        )
