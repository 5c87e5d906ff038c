"""Distillation of a teacher into a smaller model."""

from __future__ import annotations

import hashlib
from dataclasses import field
from typing import Generic

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from typing_extensions import override

from ptacc.composition.composable import hook
from ptacc.errors import LossError, OptionError
from ptacc.tensors.fingerprint import compute_fingerprint
from ptacc.trainers.supervised import Trainer
from ptacc.types.aliases import ModelT, Pair
from ptacc.types.outputs import StepOutput
from ptacc.validation import check_positive


class DistillationTrainer(Trainer[ModelT], Generic[ModelT]):
    """Trains a classifier, the student, on class indices and on the outputs of a teacher.

    The loss of a training batch is `(1 - teacher_share) * loss_func + teacher_share * distillation loss`. The
    distillation loss is the Kullback-Leibler divergence of the student from the teacher, both with their logits divided
    by the temperature, times its square. Evaluations have `loss_func` alone, and predictions are the student's.

    The teacher is put in eval mode, computes without gradients, is on the device in a run, and is not in checkpoints. A
    run can only be resumed with the same teacher. To save it with them, redeclare it: `teacher: nn.Module`.

    Options:
        teacher: A trained model, which takes the same inputs as the student.
        temperature: Above 0: at a higher one, the classes that the teacher gives small probabilities count more.
        teacher_share: Share of the teacher in the loss, from 0 to 1.

    Hooks: `compute_distillation_loss`. A loss that weights or ignores classes is an error, since that of the
    distillation is a mean over samples.

    Source: https://arxiv.org/abs/1503.02531

    Example:
        >>> from ptacc.testing import iris, iris_parts
        >>> from ptacc.trainers import DistillationTrainer
        >>> teacher = iris_parts()["model"]
        >>> trainer = DistillationTrainer(**iris_parts(), teacher=teacher, temperature=4.0, teacher_share=0.9)
        >>> history = trainer.train(iris(), num_epochs=1)
        >>> sorted(history[-1].train_metrics)
        ['distillation_loss', 'target_loss']
    """

    teacher: nn.Module = field(metadata={"saved": False})
    temperature: float = 2.0
    teacher_share: float = 0.5

    @override
    def check_options(self) -> None:
        owner, share = type(self).__name__, self.teacher_share
        if self.teacher is self.model:
            raise OptionError(f"{owner}(teacher=...): must be another module than the model.")
        check_positive(owner, "temperature", self.temperature)
        if not 0 <= share <= 1:
            raise OptionError(f"{owner}(teacher_share={share!r}): must be from 0 to 1.")
        self.teacher.eval()

    @hook("default")
    def compute_distillation_loss(self, outputs: Tensor, teacher_outputs: Tensor) -> Tensor:
        """Return the mean loss of the student's outputs, given those of the teacher. A default hook."""
        student, teacher = (log_softmax(logits / self.temperature, dim=1) for logits in (outputs, teacher_outputs))
        return kl_div(student, teacher, reduction="batchmean", log_target=True) * self.temperature**2

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        inputs, targets = batch
        outputs: Tensor = self.model(inputs)
        with torch.no_grad(), self.accelerator.autocast():
            teacher_outputs: Tensor = self.teacher(inputs)
        if teacher_outputs.shape != outputs.shape:
            raise LossError(
                f"{type(self).__name__}: the model gives outputs of the shape {tuple(outputs.shape)}, and the teacher "
                f"{tuple(teacher_outputs.shape)}. Override compute_distillation_loss and train_step to compare others."
            )
        of_targets = self.compute_train_loss(outputs, targets)
        of_teacher = self.compute_distillation_loss(outputs, teacher_outputs.to(outputs.dtype))
        loss = torch.lerp(of_targets, of_teacher, self.teacher_share)
        logged = {"target_loss": of_targets.detach(), "distillation_loss": of_teacher.detach()}
        return StepOutput(loss=loss, outputs=outputs, logged=logged)

    @override
    def resume_invariants(self) -> dict[str, str]:
        fingerprints = map(compute_fingerprint, self.teacher.state_dict().values())
        digest = hashlib.blake2b("".join(fingerprints).encode(), digest_size=8).hexdigest()
        return super().resume_invariants() | {"teacher": digest}
