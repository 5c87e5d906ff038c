"""A number of batches per step that changes in the course of a run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR

from ptacc import CheckpointMixin, Epochs, GradAccumMixin, LRSchedulerMixin, RunPlan, Steps, Trainer
from ptacc.errors import OptionError
from ptacc.protocols import SchedulerFactory
from ptacc.testing import tiny_data, tiny_parts
from ptacc.tuning import find_batch_size
from tests.ranks import run_ranks

BY_EPOCH = {Epochs(1): 4, Epochs(3): 2}
BY_STEP = {Steps(3): 2, Steps(9): 5}
ITEMS = {
    "epochs": [4] * 7 + [16, 12] * 2 + [8, 8, 8, 4],
    "steps": [4, 4, 4, 8, 8] + [8, 8, 8, 4] + [20, 8] * 2,
}
"""Items of each step in four epochs of 28 samples, in batches of 4."""
SCHEDULES: dict[str, Any] = {"epochs": BY_EPOCH, "steps": BY_STEP}


def falling(optimizer: Optimizer, plan: RunPlan) -> LinearLR:
    return LinearLR(optimizer, 1.0, 0.0, total_iters=plan.total_steps)


class Accumulating(GradAccumMixin, LRSchedulerMixin, Trainer):
    create_scheduler: SchedulerFactory = falling


class Saving(CheckpointMixin, Accumulating): ...


def train(
    name: str, kind: Any = Accumulating, *, batch: int = 4, **options: Any
) -> tuple[Trainer, list[float], list[float]]:
    """Return the trainer after four epochs, with the items and the losses of the steps of its last attempt."""
    trainer = kind(**tiny_parts(), **options, accumulation_schedule=SCHEDULES[name])
    limits: Any = {"num_epochs": 4, "per_device_batch_size": batch, "train_dataloader_kwargs": {"shuffle": False}}
    steps = trainer.train(tiny_data(28), **limits).steps
    return trainer, [step.items for step in steps], [step.loss for step in steps]


def weight(trainer: Trainer) -> Tensor:
    return next(trainer.unwrapped_model.parameters()).detach()


def train_plainly(items: list[float]) -> tuple[Tensor, list[float]]:
    """Train in batches of 4, with a step after each number of items."""
    parts, losses = tiny_parts(), list[float]()
    model, optimizer = parts["model"], parts["optimizer"]
    schedule = LinearLR(optimizer, 1.0, 0.0, total_iters=len(items))
    inputs, targets = tiny_data(28).tensors
    batches = [(inputs[i : i + 4], targets[i : i + 4]) for i in range(0, 28, 4)] * 4
    for count in items:
        window = [batches.pop(0) for _ in range(int(count) // 4)]
        scaled = [nn.functional.cross_entropy(model(x), y) / (count / 4) for x, y in window]
        for loss in scaled:
            loss.backward()  # type: ignore[no-untyped-call]
        losses.append(sum(loss.item() for loss in scaled))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return next(model.parameters()).detach(), losses


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_equals_a_plain_loop(name: str) -> None:
    trainer, items, losses = train(name)
    assert items == ITEMS[name]
    expected_weight, expected_losses = train_plainly(items)
    assert losses == expected_losses
    assert torch.equal(weight(trainer), expected_weight)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_resumes_exactly_at_each_step(tmp_path: Path, name: str) -> None:
    whole, *_ = train(name, Saving, checkpoint_dir=tmp_path / "whole", checkpoint_every=Steps(1), keep_last=None)
    for step in range(1, len(ITEMS[name])):
        start = tmp_path / "whole" / f"step-{step:08}"
        resumed, items, _ = train(name, Saving, checkpoint_dir=tmp_path / f"{step}", resume=start)
        assert items == ITEMS[name]
        assert torch.equal(weight(resumed), weight(whole))


@pytest.mark.parametrize("name", SCHEDULES)
def test_processes_take_the_same_steps(name: str) -> None:
    def worker() -> tuple[list[float], list[float], list[float]]:
        trainer, items, losses = train(name, batch=2)
        return items, losses, weight(trainer).flatten().tolist()

    (items, losses, weights), other = run_ranks(worker, 2, timeout=60)
    assert other == (items, losses, weights)
    trainer, expected_items, expected_losses = train(name)
    assert items == expected_items
    assert losses == pytest.approx(expected_losses, rel=1e-12)
    assert weights == pytest.approx(weight(trainer).flatten().tolist(), rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_processes_resume_exactly(tmp_path: Path, name: str) -> None:
    def worker(directory: Path, **options: Any) -> list[float]:
        trainer, *_ = train(name, Saving, batch=2, checkpoint_dir=directory, **options)
        return weight(trainer).flatten().tolist()

    def resume_at_some_steps() -> list[list[float]]:
        whole = worker(tmp_path / "whole", checkpoint_every=Steps(1), keep_last=None)
        starts = [tmp_path / "whole" / f"step-{step:08}" for step in (2, 4, 8, 9, 12)]
        return [whole, *(worker(tmp_path / start.name, resume=start) for start in starts)]

    for results in run_ranks(resume_at_some_steps, 2, timeout=60):
        assert results == [results[0]] * 6


def test_the_description_shows_each_global_batch_and_the_length_of_the_run() -> None:
    trainer = Accumulating(**tiny_parts(), accumulation_schedule=BY_EPOCH)
    rows: Any = dict(trainer.explain(tiny_data(28), num_epochs=4, per_device_batch_size=4)["batches"])  # type: ignore[arg-type]
    assert [name for name in rows if "after" in name] == [
        "samples per step, after 1 epoch",
        "samples per step, after 3 epochs",
    ]
    assert rows["total steps"].startswith(f"{len(ITEMS['epochs'])} in 4 epochs")


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({Epochs(3): 0}, r"accumulation_schedule=0\): must be an integer of at least 1"),
        ({Epochs(3): 2.0}, r"accumulation_schedule=2\.0\): must be an integer"),
        ({Epochs(3): 2, Epochs(1): 4}, "the keys must ascend"),
        ({Epochs(1): 2, Steps(1): 4}, "must map Epochs or Steps"),
        ({3: 4}, r"must map Epochs or Steps to batches per step: \{Epochs\(3\): 4\} is 4 after 3 epochs"),
        (4, "must map Epochs or Steps to batches per step"),
        ({}, "must map Epochs or Steps to batches per step"),
    ],
)
def test_a_wrong_schedule_is_an_error(schedule: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Accumulating(**tiny_parts(), accumulation_schedule=schedule)


def test_the_search_for_a_batch_size_needs_one_global_batch() -> None:
    trainer = Accumulating(**tiny_parts(), accumulation_schedule=BY_EPOCH)
    with pytest.raises(OptionError, match=r"global batch of Accumulating changes .* \(1, 4 after 1 epoch, 2 after 3"):
        find_batch_size(trainer, tiny_data(), global_batch_size=8)
