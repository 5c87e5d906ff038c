"""Mixing the samples of a batch, and their targets, as MixUp and CutMix do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from torch import Tensor
from torch.nn.functional import one_hot

from ptacc.errors import DataError
from ptacc.types.aliases import Pair


@dataclass(frozen=True, slots=True)
class Mix:
    """How to mix a batch.

    Args:
        share: Share of a sample's own targets, from 0 to 1; the other sample has the rest.
        box: For CutMix, the rows and columns of the images that are pasted. None for MixUp.
    """

    share: float
    box: tuple[slice, slice] | None = None


def draw_mix(random: Random, mixup_alpha: float | None, cutmix_alpha: float | None, inputs: Tensor) -> Mix:
    """Draw how to mix a batch: by MixUp or CutMix, each with probability 1/2 if both have an `alpha`."""
    is_cutmix = cutmix_alpha is not None and (mixup_alpha is None or random.random() < 0.5)
    alpha = cutmix_alpha if is_cutmix else mixup_alpha
    assert alpha is not None
    share = random.betavariate(alpha, alpha)
    return draw_box(random, share, inputs.shape) if is_cutmix else Mix(share)


def draw_box(random: Random, share: float, shape: Sequence[int]) -> Mix:
    """Draw the box of CutMix, whose part outside of the image is cut off: the share is that of the remaining area.

    Raises:
        DataError: The inputs are not images.
    """
    if len(shape) < 3:
        raise DataError(
            f"cutmix_alpha needs images (items, ..., height, width), and the inputs have the shape {tuple(shape)}. Use "
            "mixup_alpha for them."
        )
    sides = []
    for length in shape[-2:]:
        centre, half = random.randrange(length), int(length * math.sqrt(1 - share)) // 2
        sides.append(slice(max(centre - half, 0), min(centre + half, length)))
    rows, columns = sides
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return Mix(1 - area / (shape[-2] * shape[-1]), (rows, columns))


def mix_pair(batch: Pair, mix: Mix, classes: int | None) -> Pair:
    """Mix each sample of a batch with the one before it, the first with the last.

    Raises:
        DataError: The inputs are not in floating point, or the number of classes is missing.
    """
    inputs, targets = batch
    if not inputs.is_floating_point():
        raise DataError(
            f"MixUpMixin mixes inputs in floating point, and got {inputs.dtype}. Convert them in the dataset, or mix "
            "embeddings in the model."
        )
    if not targets.is_floating_point():
        if classes is None:
            raise DataError(
                f"MixUpMixin got targets of {targets.dtype}, class indices, whose number of classes is unknown. Give "
                "mixup_classes. Targets of a regression have to be in floating point."
            )
        targets = one_hot(targets.long(), classes).movedim(-1, 1).to(inputs.dtype)
    if mix.box is None:
        mixed = blend(inputs, mix.share)
    else:
        mixed = inputs.clone()
        mixed[..., *mix.box] = inputs[..., *mix.box].roll(1, dims=0)
    return mixed, blend(targets, mix.share)


def blend(values: Tensor, share: float) -> Tensor:
    """Return `share` of each value and `1 - share` of the one before it in the batch."""
    return values * share + values.roll(1, dims=0) * (1 - share)
