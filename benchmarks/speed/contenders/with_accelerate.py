"""A plain loop with Accelerate, as in its documentation."""

from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.speed.jobs import Job


def train(job: Job, *, saves: bool = False) -> float:
    accelerator: Any = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(job.model, job.optimizer, job.loader)
    loss_sum, items = torch.zeros((), dtype=torch.float64), 0
    model.train()
    for _ in range(job.epochs):
        for inputs, targets in loader:
            loss = job.loss_func(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            loss_sum.add_(loss.detach(), alpha=len(targets))
            items += len(targets)
        if saves:
            accelerator.save_state(str(job.folder / "last"))
    accelerator.free_memory()
    return float(loss_sum) / items


def train_and_save(job: Job) -> float:
    return train(job, saves=True)


@torch.no_grad()
def evaluate(job: Job) -> float:
    accelerator: Any = Accelerator(cpu=True)
    model, loader = accelerator.prepare(job.model, job.loader)
    loss_sum, items = torch.zeros((), dtype=torch.float64), 0
    model.eval()
    for inputs, targets in loader:
        losses = accelerator.gather_for_metrics(job.loss_func(model(inputs), targets))
        loss_sum.add_(losses.mean(), alpha=len(targets))
        items += len(targets)
    accelerator.free_memory()
    return float(loss_sum) / items


RUNS = {"train": train, "evaluate": evaluate, "two-processes": train, "saves": train_and_save}
