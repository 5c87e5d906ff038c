"""The differences between two trainings, and their usual causes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from ptacc.model.state_dict import copy_to_host
from ptacc.tuning.isolated import AnyLoop
from ptacc.types.outputs import StepRecord

NORM_FLOOR = 1e-3
"""The smallest norm to which a tensor's difference is compared, as a fraction of the norm of all weights.

Some gradients are 0 except for rounding, like that of a bias that is added to all logits of a softmax. The difference
of such a tensor is large compared with its own norm, and small compared with the other weights.
"""


@dataclass(frozen=True)
class Tolerance:
    """The largest relative differences that count as rounding: of a loss, and of a weight tensor by its norm."""

    losses: float
    weights: float


TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-12, 1e-10),
    torch.float32: Tolerance(1e-5, 1e-5),
}
LOW_PRECISION = Tolerance(2e-2, 2e-2)
"""For bf16 and fp16, whose significands have 8 and 11 bits."""


@dataclass(frozen=True)
class BatchSplit:
    """How each replica takes the samples of a step: in `batches` batches of `size`."""

    size: int
    batches: int
    replicas: int

    @override
    def __str__(self) -> str:
        kind = f"{self.batches} batches of {self.size}" if self.batches > 1 else f"one batch of {self.size}"
        return kind if self.replicas == 1 else f"{kind} on each of {self.replicas} replicas"


@dataclass(frozen=True)
class TrainingResult:
    """The steps of a training and the weights at its end."""

    split: BatchSplit
    steps: Sequence[StepRecord]
    weights: Mapping[str, Tensor]


def copy_tensors(values: Iterable[tuple[str, object]]) -> dict[str, Tensor]:
    """Return copies on the host of the tensors among named values."""
    return {name: copy_to_host(value) for name, value in values if isinstance(value, Tensor)}


def select_tolerance(trainer: AnyLoop) -> Tolerance:
    """Return the tolerance for the lowest precision that a trainer computes in."""
    if trainer.accelerator.mixed_precision != "no":
        return LOW_PRECISION
    dtypes = {parameter.dtype.to_real() for parameter in trainer.unwrapped_model.parameters()}
    return max((TOLERANCES.get(dtype, LOW_PRECISION) for dtype in dtypes), key=lambda tolerance: tolerance.losses)


def find_differences(got: TrainingResult, expected: TrainingResult, tolerance: Tolerance) -> Iterator[str]:
    """Yield a sentence for each difference above rounding. An earlier one may cause later ones."""
    if len(got.steps) != len(expected.steps):
        yield (
            f"it takes {len(got.steps)} steps in {got.split}, and {len(expected.steps)} in {expected.split}. Look for "
            "drop_last, a loader that ignores per_device_batch_size, and anything that ends the run early."
        )
    for step, reference in zip(got.steps, expected.steps, strict=False):
        if not math.isfinite(reference.loss):
            yield (
                f"the loss of step {reference.step} is {reference.loss} in {expected.split}, so other splits "
                "cannot be compared with it."
            )
        distance, larger = abs(step.loss - reference.loss), max(abs(step.loss), abs(reference.loss))
        difference = distance / larger if distance else 0.0
        if not difference <= tolerance.losses:
            yield (
                f"the loss of step {step.step} is {step.loss:.9g} in {got.split}, and {reference.loss:.9g} in "
                f"{expected.split}: a relative difference of {difference:.1e}, and {tolerance.losses:.0e} counts as "
                f"rounding.{describe_step(step, reference)}"
            )
    floor = NORM_FLOOR * math.hypot(*map(norm, expected.weights.values()))
    for name, reference_weight in expected.weights.items():
        weight = got.weights[name]
        distance = norm(weight - reference_weight)
        difference = distance / max(norm(reference_weight), floor) if distance else 0.0
        if not difference <= tolerance.weights:
            yield (
                f"the losses agree, but {name!r} ends with the norm {norm(weight):.9g} in {got.split}, and "
                f"{norm(reference_weight):.9g} in {expected.split}: the norm of the difference is {difference:.1e} of "
                f"it, and {tolerance.weights:.0e} counts as rounding. If the optimizer is a variant of Adam, make the "
                "trainer with SGD: Adam takes a full-sized step also along a gradient that is only rounding."
            )


def norm(tensor: Tensor) -> float:
    """Return the 2-norm of a tensor."""
    return float(torch.linalg.vector_norm(tensor))


def describe_step(step: StepRecord, reference: StepRecord) -> str:
    """Describe what to check for a step with another loss: its number of items, and the steps before it."""
    causes = ""
    if step.items != reference.items:
        causes += (
            f" count_items counts {step.items:g} items in the step, and {reference.items:g} where it is one batch: it "
            "counts what depends on the split, such as padding, or the batches have other samples."
        )
    if step.step > 1:
        causes += (
            " The losses of earlier steps agree, so check also what is done to the gradients of each batch (in "
            "`backward`, in tensor hooks), and batches of unequal size."
        )
    return causes


def describe_causes(trainer: AnyLoop) -> str:
    """Describe the usual causes of a difference, after those that are found in the model."""
    found = [
        f"{name or 'the model'} is a {type(module).__name__}, which {reason}"
        for name, module in trainer.unwrapped_model.named_modules()
        if (reason := describe_batch_dependence(module))
    ]
    more = f", and so are {len(found) - 3} more" if len(found) > 3 else ""
    in_model = f"In the model, {'; '.join(found[:3])}{more}. " if found else ""
    return (
        f"{in_model}The usual causes: the loss is a mean over something else than what count_items counts (override "
        "it, or return StepOutput.from_sum); the loss is divided by the number of batches a step a second time; batch "
        "norm; dropout; samples that are compared with others of their batch; random transforms."
    )


def describe_batch_dependence(module: nn.Module) -> str:
    """Describe why a module's output for a sample depends on the rest of its batch; empty if it does not.

    Example:
        >>> describe_batch_dependence(nn.Dropout(0.1)), describe_batch_dependence(nn.LSTM(2, 2))
        ('draws random numbers for each batch', '')
    """
    name = type(module).__name__
    if "BatchNorm" in name:  # by name, which finds those of other libraries
        return "takes mean and variance over a batch"
    rate = getattr(module, "p", 1.0) if "Dropout" in name else getattr(module, "dropout", 0.0)
    if isinstance(rate, float) and rate > 0:  # attention and recurrent layers have dropout of their own
        return "draws random numbers for each batch"
    return ""
