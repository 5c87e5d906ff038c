"""MixUp and CutMix."""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor
from typing_extensions import override

from ptacc.core.batch_hooks import BatchMixin
from ptacc.rng import derive_seed
from ptacc.tensors.mixing import Mix, draw_mix, mix_pair
from ptacc.types.aliases import OutputT, Pair
from ptacc.types.outputs import StepOutput
from ptacc.validation import check_at_least, check_positive

MIXING = 0x6D697875
"""Distinguishes these random numbers from others that are derived from the seed of the run."""


class MixUpMixin(BatchMixin[Pair, OutputT]):
    """Mixes pairs of samples of each training batch, and their targets: MixUp, CutMix, or one of them at random.

    Each sample is mixed with the one before it in the batch. Class indices `(items, ...)` become probabilities
    `(items, classes, ...)`, as `nn.CrossEntropyLoss` takes them. Targets in floating point are mixed as they are. The
    random numbers depend on the seed of the run and the position of the batch, so a resumed run mixes as an
    uninterrupted one. Evaluations and predictions are not changed.

    Options:
        mixup_alpha: Concentration of MixUp, above 0: a sample keeps the share `lam ~ Beta(alpha, alpha)`, the same for
            the whole batch. None, the default, turns MixUp off.
        cutmix_alpha: Concentration of CutMix, above 0: a box with `1 - lam` of the area is pasted from the other image.
            Inputs are images `(items, ..., height, width)`. None, the default, turns CutMix off.
        mixup_classes: Number of classes, at least 2. Needed if the targets are class indices.

    Hooks: `train_step`.

    Combines with: everything. Training metrics get the outputs of mixed inputs, with the targets from before mixing. A
    loss that weights or ignores classes is an error, since its items in training are the samples.

    Source: https://arxiv.org/abs/1710.09412 (MixUp), https://arxiv.org/abs/1905.04899 (CutMix).

    Example:
        >>> from ptacc import MixUpMixin, Trainer
        >>> class MyTrainer(MixUpMixin, Trainer):
        ...     mixup_alpha = 0.2
        ...     mixup_classes = 10
    """

    mixup_alpha: float | None = None
    cutmix_alpha: float | None = None
    mixup_classes: int | None = None

    @override
    def check_options(self) -> None:
        owner = type(self).__name__
        for name, alpha in (("mixup_alpha", self.mixup_alpha), ("cutmix_alpha", self.cutmix_alpha)):
            if alpha is not None:
                check_positive(owner, name, alpha)
        if self.mixup_classes is not None:
            check_at_least(owner, "mixup_classes", self.mixup_classes, 2)

    @override
    def train_step(self, batch: Pair) -> StepOutput[OutputT]:
        mix = self._draw_mix(batch[0])
        return super().train_step(batch if mix is None else mix_pair(batch, mix, self.mixup_classes))

    def _draw_mix(self, inputs: Tensor) -> Mix | None:
        """Draw how to mix a batch of the current step; None if it is not mixed, as in an evaluation."""
        host = self.run.batch if self.is_running else None
        if host is None or not torch.is_grad_enabled() or (self.mixup_alpha is None and self.cutmix_alpha is None):
            return None
        place = (self.progress.epochs, host.end, self.distributed.replica)
        return draw_mix(Random(derive_seed(self.run.seed, MIXING, *place)), self.mixup_alpha, self.cutmix_alpha, inputs)
