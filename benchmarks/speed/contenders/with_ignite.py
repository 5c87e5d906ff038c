"""ignite, with a handwritten update function."""

# pyright: reportMissingImports=false

from typing import Any

import torch
from ignite.engine import Engine

from benchmarks.speed.jobs import Job


def train(job: Job) -> float:
    loss_sum, items = torch.zeros((), dtype=torch.float64), 0

    def update(_engine: Any, batch: Any) -> None:
        nonlocal items
        inputs, targets = batch
        loss = job.loss_func(job.model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        job.optimizer.step()
        job.optimizer.zero_grad()
        loss_sum.add_(loss.detach(), alpha=len(targets))
        items += len(targets)

    job.model.train()
    Engine(update).run(job.loader, max_epochs=job.epochs)
    return float(loss_sum) / items


@torch.no_grad()
def evaluate(job: Job) -> float:
    loss_sum, items = torch.zeros((), dtype=torch.float64), 0

    def update(_engine: Any, batch: Any) -> None:
        nonlocal items
        inputs, targets = batch
        loss_sum.add_(job.loss_func(job.model(inputs), targets), alpha=len(targets))
        items += len(targets)

    job.model.eval()
    Engine(update).run(job.loader, max_epochs=1)
    return float(loss_sum) / items


RUNS = {"train": train, "evaluate": evaluate}
