"""What differs between two trainings, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import override

from ptacc.loop.loop import TrainingLoop
from ptacc.types.outputs import StepRecord

AnyLoop: TypeAlias = TrainingLoop[Any, Any, Any]

WEIGHT_FLOOR = 1e-3
"""A tensor whose norm is below this part of all weights' is compared on the scale of that part.

Rounding is relative to the numbers that a gradient is computed from. Where they cancel, as in the gradient of a bias in
front of a softmax over all that it is added to, the rest is nothing but rounding, far below every other weight.
"""


@dataclass(frozen=True)
class Tolerance:
    """What passes for rounding: relative differences of a loss, and of the norm of a tensor of weights."""

    losses: float
    weights: float


TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-12, 1e-10),
    torch.float32: Tolerance(1e-5, 1e-5),
}
LOW_PRECISION = Tolerance(2e-2, 2e-2)
"""For bf16 and fp16, whose numbers have 8 and 11 digits in base 2."""


@dataclass(frozen=True)
class Split:
    """How each process takes the samples of a window: in `batches` batches of `size`."""

    size: int
    batches: int
    replicas: int

    @override
    def __str__(self) -> str:
        kind = f"{self.batches} batches of {self.size}" if self.batches > 1 else f"one batch of {self.size}"
        return kind if self.replicas == 1 else f"{kind} on each of {self.replicas} replicas"


@dataclass(frozen=True)
class TrainingResult:
    """What came of a training."""

    split: Split
    steps: Sequence[StepRecord]
    weights: Mapping[str, Tensor]


# ---- comparing


def select_tolerance(trainer: AnyLoop) -> Tolerance:
    """Return what passes for rounding in the lowest precision that a trainer computes in."""
    if trainer.accelerator.mixed_precision != "no":
        return LOW_PRECISION
    dtypes = {parameter.dtype.to_real() for parameter in trainer.unwrapped_model.parameters()}
    return max((TOLERANCES.get(dtype, LOW_PRECISION) for dtype in dtypes), key=lambda tolerance: tolerance.losses)


def differences(got: TrainingResult, expected: TrainingResult, tolerance: Tolerance) -> Iterator[str]:
    """Yield what differs by more than rounding, the first cause of the rest first."""
    ours, theirs = got.split, expected.split
    if len(got.steps) != len(expected.steps):
        yield (
            f"it takes {len(got.steps)} steps in {ours}, and {len(expected.steps)} in {theirs}. Look for drop_last, a "
            "loader that does not take per_device_batch_size, and what ends the run early."
        )
    for step, other in zip(got.steps, expected.steps, strict=False):
        if not math.isfinite(other.loss):
            yield f"the loss of step {other.step} is {other.loss} in {theirs}, and there is nothing to compare it with."
        relative = relative_difference(step.loss, other.loss)
        if not relative <= tolerance.losses:
            yield (
                f"the loss of step {step.step} is {step.loss:.9g} in {ours}, and {other.loss:.9g} in {theirs}: a "
                f"relative difference of {relative:.1e}, and {tolerance.losses:.0e} passes for rounding."
                f"{told_items(step, other)}{told_update(step)}"
            )
    floor = WEIGHT_FLOOR * math.hypot(*map(norm, expected.weights.values()))
    for name, wanted in expected.weights.items():
        distance = norm(got.weights[name] - wanted)
        relative = distance / max(norm(wanted), floor) if distance else 0.0
        if not relative <= tolerance.weights:
            yield (
                f"the losses agree, but {name!r} ends with the norm {norm(got.weights[name]):.9g} in {ours}, and "
                f"{norm(wanted):.9g} in {theirs}: the norm of the difference is {relative:.1e} of it, and "
                f"{tolerance.weights:.0e} passes for rounding. If the optimizer is of Adam's kind, make the trainer "
                "with SGD: a gradient that is nothing but rounding becomes a whole step there."
            )


def relative_difference(left: float, right: float) -> float:
    """Return how far two numbers are apart, as a part of the larger one.

    Example:
        >>> relative_difference(1.0, 2.0), relative_difference(0.0, 0.0)
        (0.5, 0.0)
    """
    return abs(left - right) / max(abs(left), abs(right)) if left != right else 0.0


def norm(tensor: Tensor) -> float:
    """Return the 2-norm."""
    return float(torch.linalg.vector_norm(tensor))


# ---- explaining


def told_items(step: StepRecord, other: StepRecord) -> str:
    """Say that the items of a step depend on its split, where they do."""
    if step.items == other.items:
        return ""
    return (
        f" count_items counts {step.items:g} items in the step, and {other.items:g} where it is one batch: it counts "
        "what depends on the split, such as padding, or the batches are of other samples."
    )


def told_update(step: StepRecord) -> str:
    """Say where to look as well when the losses before a step agree."""
    if step.step == 1:
        return ""
    return (
        " The losses of the steps before agree, so look also at what is done to the gradients of each batch (in "
        "`backward`, in hooks of tensors) and at ragged batches."
    )


def causes(trainer: AnyLoop) -> str:
    """Name what usually causes a difference, first of all what is seen in the model."""
    seen = [
        f"{name or 'the model'} is a {type(module).__name__}, which {why}"
        for name, module in trainer.unwrapped_model.named_modules()
        if (why := mixes_samples(module))
    ]
    more = f", and so are {len(seen) - 3} more" if len(seen) > 3 else ""
    found = f"In the model, {'; '.join(seen[:3])}{more}. " if seen else ""
    return (
        f"{found}The usual causes: the loss is a mean over something else than what count_items says (override it, or "
        "return StepOutput.from_sum); it is divided by the number of batches a step once more; batch norm; dropout; "
        "samples that are compared with others of their batch; random transforms."
    )


def mixes_samples(module: nn.Module) -> str:
    """Say why a module's outputs for a sample depend on more than the sample, empty if they do not.

    Example:
        >>> mixes_samples(nn.Dropout(0.1)), mixes_samples(nn.LSTM(2, 2))
        ('draws anew for each batch', '')
    """
    name = type(module).__name__
    if "BatchNorm" in name:  # by its name, for those of other libraries
        return "takes mean and variance over a batch"
    rate = getattr(module, "p", 1.0) if "Dropout" in name else getattr(module, "dropout", 0.0)
    if isinstance(rate, float) and rate > 0:  # attention and recurrent layers drop by themselves
        return "draws anew for each batch"
    return ""
