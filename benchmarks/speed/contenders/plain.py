"""A minimal plain PyTorch loop that trains and sums its loss. With two processes it uses plain DDP."""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from benchmarks.speed.jobs import FixedShuffle, Job, RankShard


def train(job: Job) -> float:
    model, optimizer, loss_func, loader = job.model, job.optimizer, job.loss_func, job.loader
    loss_sum, items = torch.zeros((), dtype=torch.float64), 0
    model.train()
    for _ in range(job.epochs):
        for inputs, targets in loader:
            loss = loss_func(model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            loss_sum.add_(loss.detach(), alpha=len(targets))
            items += len(targets)
    return float(loss_sum) / items


def train_composed(job: Job) -> float:
    """Train with a schedule, evaluate each epoch with a metric, and stop when the loss no longer improves."""
    from torchmetrics.classification import MulticlassAccuracy

    model, optimizer, loss_func, loader = job.model, job.optimizer, job.loss_func, job.loader
    schedule = job.make_schedule(optimizer)
    accuracy = MulticlassAccuracy(num_classes=10, average="micro")
    loss_sum, items = torch.zeros((), dtype=torch.float64), 0
    best, epochs_without_improvement = float("inf"), 0
    for _ in range(job.epochs):
        model.train()
        for inputs, targets in loader:
            loss = loss_func(model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            loss_sum.add_(loss.detach(), alpha=len(targets))
            items += len(targets)
        accuracy.reset()
        eval_loss = mean_loss(model, job, job.eval_loader, accuracy)
        accuracy.compute()
        is_better = eval_loss < best
        best, epochs_without_improvement = min(best, eval_loss), 0 if is_better else epochs_without_improvement + 1
        if epochs_without_improvement == 100:
            break
    return float(loss_sum) / items


def train_in_processes(job: Job) -> float:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    assert isinstance(job.loader.sampler, FixedShuffle)
    sampler = RankShard(job.loader.sampler, job.batch_size, rank, world_size)
    loader = DataLoader(job.loader.dataset, batch_size=job.batch_size, sampler=sampler)
    wrapped = DistributedDataParallel(job.model)
    return train(Job(wrapped, job.optimizer, job.loss_func, loader, job.eval_loader, job.epochs, job.folder))


@torch.no_grad()
def mean_loss(model: nn.Module, job: Job, loader: DataLoader[tuple[Tensor, Tensor]], metric: nn.Module | None) -> float:
    loss_sum, items = torch.zeros((), dtype=torch.float64), 0
    model.eval()
    for inputs, targets in loader:
        outputs = model(inputs)
        loss_sum.add_(job.loss_func(outputs, targets), alpha=len(targets))
        items += len(targets)
        if metric is not None:
            metric.update(outputs, targets)  # type: ignore[operator]
    return float(loss_sum) / items


def evaluate(job: Job) -> float:
    return mean_loss(job.model, job, job.loader, None)


def train_and_save(job: Job) -> float:
    """Train, and replace a synced file with the state after each epoch."""
    loss_sum, items = torch.zeros((), dtype=torch.float64), 0
    job.model.train()
    for epoch in range(job.epochs):
        for inputs, targets in job.loader:
            loss = job.loss_func(job.model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            job.optimizer.step()
            job.optimizer.zero_grad()
            loss_sum.add_(loss.detach(), alpha=len(targets))
            items += len(targets)
        state = {"model": job.model.state_dict(), "optimizer": job.optimizer.state_dict(), "epoch": epoch}
        with (job.folder / "new.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        (job.folder / "new.pt").replace(job.folder / "last.pt")
    return float(loss_sum) / items


RUNS = {
    "train": train,
    "evaluate": evaluate,
    "callbacks": train,
    "composed": train_composed,
    "in-memory": train,
    "two-processes": train_in_processes,
    "saves": train_and_save,
}
