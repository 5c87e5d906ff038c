"""Workloads: what every contender is asked to do, and what ptacc is to reach."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.speed.jobs import SEED, AsPtaccShuffles, BatchAtOnce, Job, SampleBySample, Shuffled, as_it_is
from benchmarks.speed.tasks import CONVNET, GPT, LARGE, ONE_STEP, PERCEPTRON, SAVED, Task

Loading = Literal["tensors", "samples", "batches"]
DATASETS = {"tensors": TensorDataset, "samples": SampleBySample, "batches": BatchAtOnce}


@dataclass(frozen=True)
class Workload:
    """One thing to measure: the time of `long` epochs less that of `short` ones, so that what surrounds them cancels.

    Args:
        name: What the command line and contenders call it.
        title: What the table calls it.
        task: The model and its data.
        short: Epochs of the short run.
        long: Epochs of the long run.
        loading: How samples come out of the dataset.
        evaluates: Whether it is an evaluation, of data repeated so often, and no training.
        in_ptaccs_order: Whether the plain loop's order is ptacc's own, and not everyone's.
        processes: Processes that share each step.
        goal: The ratio to plain PyTorch that ptacc is to stay below.
        goal_is_for: Whether that is the median, or the upper end of the interval.
    """

    name: str
    title: str
    task: Task
    short: int
    long: int
    loading: Loading = "tensors"
    evaluates: bool = False
    in_ptaccs_order: bool = False
    processes: int = 1
    goal: float | None = None
    goal_is_for: Literal["median", "upper end"] = "median"

    def make_job(self, epochs: int, folder: Path) -> Job:
        """Make the model, its optimizer and its data, the same in every process."""
        torch.manual_seed(SEED)
        model = self.task.make_model()
        inputs, targets = self.task.make_data()
        if self.evaluates:
            inputs, targets = (part.repeat(epochs, *[1] * (part.dim() - 1)) for part in (inputs, targets))
        dataset = DATASETS[self.loading](inputs, targets)
        sampler = AsPtaccShuffles(len(inputs)) if self.in_ptaccs_order else Shuffled(len(inputs))
        loader = DataLoader(
            dataset,
            batch_size=self.task.batch_size,
            sampler=None if self.evaluates else sampler,
            collate_fn=as_it_is if self.loading == "batches" else None,
        )
        few = TensorDataset(inputs[:512], targets[:512])
        eval_loader = DataLoader(few, batch_size=self.task.batch_size)
        optimizer = self.task.make_optimizer(model)
        return Job(model, optimizer, nn.CrossEntropyLoss(), loader, eval_loader, epochs, folder)

    @property
    def batches(self) -> int:
        """Batches between the short run and the long one, of one process."""
        samples = len(self.task.make_data()[0])
        return (self.long - self.short) * samples // self.task.batch_size // self.processes


STEP = Workload("step", "a step of a tiny perceptron, `DataLoader(TensorDataset)`", PERCEPTRON, 1, 5, goal=1.05)
WORKLOADS = {
    workload.name: workload
    for workload in (
        STEP,
        dataclasses.replace(
            STEP, name="step-samples", title="a step, a dataset of one's own, sample by sample", loading="samples"
        ),
        dataclasses.replace(
            STEP,
            name="step-batches",
            title="a step, a dataset of one's own, whole batches",
            loading="batches",
        ),
        dataclasses.replace(STEP, name="callbacks", title="a step with the default callbacks", goal=1.10),
        dataclasses.replace(STEP, name="composed", title="a step with eight mixins composed", goal=1.10),
        dataclasses.replace(
            STEP,
            name="in-memory",
            title="a `TensorDataset`, default settings, against `DataLoader(TensorDataset)`",
            in_ptaccs_order=True,
            long=9,
            goal=0.75,
        ),
        Workload("convnet", "a small convolutional net on digits", CONVNET, 1, 9, goal=1.02, goal_is_for="upper end"),
        Workload("gpt", "a small GPT on text", GPT, 1, 17, goal=1.02, goal_is_for="upper end"),
        Workload("evaluate", "evaluation of the perceptron", PERCEPTRON, 1, 5, evaluates=True, goal=1.05),
        Workload(
            "evaluate-samples",
            "evaluation, a dataset of one's own, sample by sample",
            PERCEPTRON,
            1,
            5,
            loading="samples",
            evaluates=True,
            goal=1.05,
        ),
        dataclasses.replace(STEP, name="two-processes", title="a step of two processes", long=9, processes=2),
        Workload("saves", "a checkpoint each step, of 150 MB", SAVED, 1, 3),
    )
}
# Both are trained once, in a fresh process.
FIRST_STEP = Workload("first-step", "the first step", ONE_STEP, 0, 1)
MEMORY = Workload("memory", "training a model that takes memory", LARGE, 0, 3)
