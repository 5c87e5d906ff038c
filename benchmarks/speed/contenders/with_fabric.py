"""A plain loop with Lightning's Fabric."""

# pyright: reportMissingImports=false

import torch
from lightning.fabric import Fabric

from benchmarks.speed.jobs import Job


def train(job: Job) -> float:
    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(job.model, job.optimizer)
    loader = fabric.setup_dataloaders(job.loader, use_distributed_sampler=False)
    loss_sum, items = torch.zeros((), dtype=torch.float64), 0
    model.train()
    for _ in range(job.epochs):
        for inputs, targets in loader:
            loss = job.loss_func(model(inputs), targets)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            loss_sum.add_(loss.detach(), alpha=len(targets))
            items += len(targets)
    return float(loss_sum) / items


@torch.no_grad()
def evaluate(job: Job) -> float:
    fabric = Fabric(accelerator="cpu", devices=1)
    model = fabric.setup(job.model)
    loss_sum, items = torch.zeros((), dtype=torch.float64), 0
    model.eval()
    for inputs, targets in fabric.setup_dataloaders(job.loader, use_distributed_sampler=False):
        loss_sum.add_(job.loss_func(model(inputs), targets), alpha=len(targets))
        items += len(targets)
    return float(loss_sum) / items


RUNS = {"train": train, "evaluate": evaluate}
