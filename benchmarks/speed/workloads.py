"""Workloads: the work of the contenders, and the goals for ptacc."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.speed.jobs import (
    SEED,
    AugmentedDataset,
    BatchDataset,
    FixedShuffle,
    Job,
    PtaccOrder,
    SampleDataset,
    return_unchanged,
)
from benchmarks.speed.tasks import CONVNET, GPT, HALF_PERCEPTRON, LARGE, ONE_STEP, PERCEPTRON, SAVED, Task

Loading = Literal["tensors", "samples", "augmented", "batches"]
DATASETS = {
    "tensors": TensorDataset,
    "samples": SampleDataset,
    "augmented": AugmentedDataset,
    "batches": BatchDataset,
}


@dataclass(frozen=True)
class Workload:
    """A workload. Its time is the time of `long` epochs minus the time of `short` epochs, which cancels setup.

    Args:
        name: The name on the command line.
        title: The title in the tables.
        task: The model and its data.
        short: The number of epochs of the short run.
        long: The number of epochs of the long run.
        run: The kind of run, a key of the contenders' `RUNS`. `"evaluate"` is an evaluation of repeated data.
        loading: How the dataset returns samples.
        workers: The number of worker processes of the loader. They live for all epochs.
        uses_ptacc_order: Whether the plain loop uses the order of ptacc instead of the fixed one.
        processes: The number of processes that share each step.
        goal: The maximum ratio of ptacc to plain PyTorch, in CPU time.
        goal_statistic: The statistic of the ratio that the goal applies to.
        quiet_goal: The maximum ratio of the quiet steps.
    """

    name: str
    title: str
    task: Task
    short: int
    long: int
    run: str = "train"
    loading: Loading = "tensors"
    workers: int = 0
    uses_ptacc_order: bool = False
    processes: int = 1
    goal: float | None = None
    goal_statistic: Literal["median", "upper end"] = "median"
    quiet_goal: float | None = None

    @property
    def evaluates(self) -> bool:
        """Whether the workload is an evaluation instead of training."""
        return self.run == "evaluate"

    def make_job(self, epochs: int, folder: Path) -> Job:
        """Create the model, its optimizer and its data, the same in every process."""
        torch.manual_seed(SEED)
        random.seed(SEED)
        np.random.seed(SEED)  # noqa: NPY002 - augmentations draw from the global generator
        model = self.task.make_model()
        inputs, targets = self.task.make_data()
        if self.evaluates:
            inputs, targets = (part.repeat(epochs, *[1] * (part.dim() - 1)) for part in (inputs, targets))
        dataset = DATASETS[self.loading](inputs, targets)
        sampler = PtaccOrder(len(inputs)) if self.uses_ptacc_order else FixedShuffle(len(inputs))
        loader = DataLoader(
            dataset,
            batch_size=self.task.batch_size,
            sampler=None if self.evaluates else sampler,
            collate_fn=return_unchanged if self.loading == "batches" else None,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )
        eval_data = TensorDataset(inputs[:512], targets[:512])
        eval_loader = DataLoader(eval_data, batch_size=self.task.batch_size)
        optimizer = self.task.make_optimizer(model)
        return Job(model, optimizer, nn.CrossEntropyLoss(), loader, eval_loader, epochs, folder)

    @property
    def batches(self) -> int:
        """The difference in batches between the long and the short run, per process."""
        samples = len(self.task.make_data()[0])
        return (self.long - self.short) * samples // self.task.batch_size // self.processes


STEP = Workload("step", "a step of a tiny perceptron, `DataLoader(TensorDataset)`", PERCEPTRON, 1, 3, goal=1.05)
STEP_SAMPLES = dataclasses.replace(
    STEP,
    name="step-samples",
    title="a step, custom dataset, single samples",
    loading="samples",
    goal=1.10,
    quiet_goal=1.05,
)
EVALUATE = Workload("evaluate", "evaluation of the perceptron", PERCEPTRON, 1, 5, run="evaluate", goal=1.05)
WORKLOADS = {
    workload.name: workload
    for workload in (
        STEP,
        STEP_SAMPLES,
        dataclasses.replace(
            STEP_SAMPLES, name="step-batches", title="a step, custom dataset, collated batches", loading="batches"
        ),
        dataclasses.replace(
            STEP,
            name="step-augmented",
            title="a step, custom dataset, random augmentation",
            loading="augmented",
            goal=None,
        ),
        dataclasses.replace(
            STEP,
            name="step-samples-workers",
            title="a step, custom dataset, single samples, two workers",
            task=HALF_PERCEPTRON,
            loading="samples",
            workers=2,
            goal=None,
        ),
        dataclasses.replace(
            STEP, name="callbacks", title="a step with the default callbacks", run="callbacks", goal=1.10
        ),
        dataclasses.replace(STEP, name="composed", title="a step with eight mixins", run="composed", goal=1.10),
        dataclasses.replace(
            STEP,
            name="in-memory",
            title="a step, `TensorDataset` and default settings, compared with `DataLoader(TensorDataset)`",
            run="in-memory",
            uses_ptacc_order=True,
            long=5,
            goal=0.75,
        ),
        Workload(
            "convnet", "a small convolutional net on digits", CONVNET, 1, 3, goal=1.02, goal_statistic="upper end"
        ),
        Workload("gpt", "a small GPT on text", GPT, 1, 3, goal=1.02, goal_statistic="upper end"),
        EVALUATE,
        dataclasses.replace(
            EVALUATE,
            name="evaluate-samples",
            title="evaluation, custom dataset, single samples",
            loading="samples",
            goal=1.10,
        ),
        dataclasses.replace(
            STEP, name="two-processes", title="a step of two processes", run="two-processes", long=5, processes=2
        ),
        Workload("saves", "a checkpoint of 150 MB per step", SAVED, 1, 3, run="saves"),
    )
}
# Both run once in a fresh process.
FIRST_STEP = Workload("first-step", "the first step", ONE_STEP, 0, 1)
MEMORY = Workload("memory", "training a large model", LARGE, 0, 2)
