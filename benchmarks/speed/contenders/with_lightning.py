"""Lightning in `barebones` mode, its mode for measuring overhead."""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false

import warnings
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from benchmarks.speed.jobs import Job

warnings.filterwarnings("ignore", module="lightning")


class Module(LightningModule):
    def __init__(self, job: Job) -> None:
        super().__init__()
        self.model, self.job = job.model, job
        self.loss_sum, self.items = torch.zeros((), dtype=torch.float64), 0

    def add_loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        loss = self.job.loss_func(self.model(inputs), targets)
        self.loss_sum.add_(loss.detach(), alpha=len(targets))
        self.items += len(targets)
        return loss

    @override
    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.add_loss(batch)

    @override
    def validation_step(self, batch: Any, index: int) -> None:
        self.add_loss(batch)

    @override
    def configure_optimizers(self) -> Optimizer:
        return self.job.optimizer


def make_trainer(job: Job) -> Any:
    return Trainer(max_epochs=job.epochs, accelerator="cpu", devices=1, barebones=True, use_distributed_sampler=False)


def train(job: Job) -> float:
    module = Module(job)
    make_trainer(job).fit(module, job.loader)
    return float(module.loss_sum) / module.items


def evaluate(job: Job) -> float:
    module = Module(job)
    make_trainer(job).validate(module, job.loader, verbose=False)
    return float(module.loss_sum) / module.items


RUNS = {"train": train, "evaluate": evaluate}
