"""torchtnt, with a handwritten step."""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false

from typing import Any

import torch
from torch import Tensor
from torchtnt.framework.evaluate import evaluate as run_evaluation
from torchtnt.framework.state import State
from torchtnt.framework.train import train as run_training
from torchtnt.framework.unit import EvalUnit, TrainUnit
from typing_extensions import override

from benchmarks.speed.jobs import Job

Batch = tuple[Tensor, Tensor]


class Unit(TrainUnit[Batch], EvalUnit[Batch]):
    def __init__(self, job: Job) -> None:
        super().__init__()
        self.model, self.optimizer, self.job = job.model, job.optimizer, job
        self.loss_sum, self.items = torch.zeros((), dtype=torch.float64), 0

    def add_loss(self, batch: Batch) -> Tensor:
        inputs, targets = batch
        loss = self.job.loss_func(self.model(inputs), targets)
        self.loss_sum.add_(loss.detach(), alpha=len(targets))
        self.items += len(targets)
        return loss

    @override
    def train_step(self, state: State, data: Batch) -> Any:
        self.add_loss(data).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()

    @override
    def eval_step(self, state: State, data: Batch) -> Any:
        self.add_loss(data)


def train(job: Job) -> float:
    unit = Unit(job)
    run_training(unit, job.loader, max_epochs=job.epochs)
    return float(unit.loss_sum) / unit.items


def evaluate(job: Job) -> float:
    unit = Unit(job)
    run_evaluation(unit, job.loader)
    return float(unit.loss_sum) / unit.items


RUNS = {"train": train, "evaluate": evaluate}
