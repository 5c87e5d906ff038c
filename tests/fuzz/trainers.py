"""Trainers of random compositions: they record the batches of each step, and can be killed at events."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ptacc import Callback, MultiUpdateLoop, StepOutput, Trainer, TrainerCore, Update

Batch = tuple[Tensor, Tensor]


class Killed:
    """Counts events, and ends the process at one of them, as a kill does."""

    def __init__(self, at: int | None) -> None:
        self.count, self.at = 0, at

    def event(self) -> None:
        self.count += 1
        if self.count == self.at:
            os._exit(9)


def convert(batch: Batch, model: nn.Module) -> Batch:
    """Return a batch with the inputs in the dtype of the model."""
    inputs, targets = batch
    return inputs.to(next(model.parameters()).dtype), targets


class RecordingTrainer(Trainer):
    """Makes one update in each step."""

    killed: Killed
    batches: dict[int, list[Batch]]
    logs_values: bool = False

    @override
    def train_step(self, batch: Batch) -> StepOutput[Tensor]:
        self.killed.event()
        batch = convert(batch, self.model)
        step = self.batches.setdefault(self.progress.steps, [])
        if self.run.batch is not None and not self.run.batch.is_padding:
            step.append((batch[0].clone(), batch[1].clone()))
        output = super().train_step(batch)
        if self.logs_values:
            return StepOutput(output.loss, output.outputs, logged={"norm": output.outputs.detach().norm()})
        return output

    @override
    def eval_step(self, batch: Batch) -> StepOutput[Tensor]:
        self.killed.event()
        return super().eval_step(convert(batch, self.model))

    @override
    def save_run_state(self) -> None:
        self.killed.event()
        super().save_run_state()
        self.killed.event()


class RecordingUpdates(MultiUpdateLoop[Batch, Tensor]):
    """Makes two updates in each step, the second one with the weights of the first."""

    killed: Killed
    batches: dict[int, list[Batch]]
    logs_values: bool = False

    @override
    def _step(self, run: Any, window: Any, transfer: Any) -> Any:
        given = [convert(host.data, self.model) for host in window.batches if not host.is_padding]
        self.batches[self.progress.steps] = [(inputs.clone(), targets.clone()) for inputs, targets in given]
        return super()._step(run, window, transfer)

    @override
    def train_updates(self, batch: Batch) -> Iterator[Update[Tensor]]:
        for name in ("first", "second"):
            self.killed.event()
            inputs, targets = convert(batch, self.model)
            outputs = self.model(inputs)
            logged = {"norm": outputs.detach().norm()} if self.logs_values else {}
            loss = nn.functional.cross_entropy(outputs, targets)
            yield Update(name, loss=loss, outputs=outputs if name == "second" else None, logged=logged)

    @override
    def eval_step(self, batch: Batch) -> StepOutput[Tensor]:
        self.killed.event()
        inputs, targets = convert(batch, self.model)
        outputs = self.model(inputs)
        return StepOutput(nn.functional.cross_entropy(outputs, targets), outputs)

    @override
    def save_run_state(self) -> None:
        self.killed.event()
        super().save_run_state()
        self.killed.event()


class FreezeForAnEpoch(Callback[TrainerCore]):
    """Freezes the first of the trained parameters by hand for one epoch, counted from 1."""

    def __init__(self, model: nn.Module, epoch: int) -> None:
        self.parameter = first_trained(model)
        self.epoch = epoch

    @override
    def on_epoch_start(self, trainer: TrainerCore) -> None:
        self.parameter.requires_grad_(trainer.progress.epochs + 1 != self.epoch)

    @override
    def on_run_end(self, trainer: TrainerCore) -> None:
        self.parameter.requires_grad_(True)


def first_trained(model: nn.Module) -> torch.nn.Parameter:
    return next(weight for weight in model.parameters() if weight.requires_grad)
