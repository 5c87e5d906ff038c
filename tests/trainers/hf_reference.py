"""Losses of steps by `transformers.Trainer`, in the order of the data."""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from typing_extensions import override

from tests.trainers.hf_models import Collate, Sample, make_optimizer

EPOCHS = 2


class ReferenceTrainer(Trainer):
    """Keeps the loss of each step, which the trainer rounds when it logs."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.batch_losses: list[Tensor] = []

    @override
    def training_step(self, *args: Any, **keywords: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **keywords)
        self.batch_losses.append(loss)
        return loss


class ExactTrainer(ReferenceTrainer):
    """Divides the sum of a step's losses by the number of its labels, for models that do not so themselves."""

    loss_is_scaled_for_ga: bool | None = True

    @override
    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        labels = inputs["labels"][..., 1:] if self._loss_shifts_labels else inputs["labels"]
        items = labels.ne(-100).sum()
        loss: Tensor = model(**inputs).loss * items * self.args.world_size / num_items_in_batch
        return loss


def reference_losses(
    model: nn.Module,
    data: list[Sample],
    collate: Collate,
    trainer_class: type[ReferenceTrainer],
    *,
    accumulate: int,
    shifts_labels: bool,
) -> list[float]:
    """Return the loss of each step, the same on all ranks."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=accumulate,
            num_train_epochs=EPOCHS,
            train_sampling_strategy="sequential",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
            dataloader_pin_memory=False,
        )
        trainer = trainer_class(
            model,
            arguments,
            train_dataset=data,
            data_collator=collate,
            optimizers=(make_optimizer(model), None),
        )
        vars(trainer)["_loss_shifts_labels"] = shifts_labels
        trainer.train()
        losses = trainer.accelerator.reduce(torch.stack(trainer.batch_losses), reduction="mean")
    per_epoch = losses.reshape(EPOCHS, -1)
    return [part.sum().item() for epoch in per_epoch for part in epoch.split(accumulate)]
