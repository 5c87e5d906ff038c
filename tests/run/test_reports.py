"""A run reports values when they are due, after each evaluation and at the end of each epoch, each step once."""

import contextlib
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset
from typing_extensions import override

from ptacc import (
    Callback,
    CheckpointMixin,
    GradAccumMixin,
    GradClipMixin,
    Pair,
    SeedMixin,
    StepOutput,
    StepResult,
    Steps,
    Trainer,
    TrainerCore,
)
from ptacc.errors import LossError, NoRunError, OptionError
from ptacc.run.history import VALUES_IN_MEMORY, RunHistory
from ptacc.testing import tiny_data, tiny_parts
from ptacc.types.outputs import EvalResult, ValuesRecord
from tests.ranks import run_ranks
from tests.records import read_lines, timeless

Reports = list[tuple[int, dict[str, float]]]


class Listener(Callback[TrainerCore]):
    def __init__(self) -> None:
        self.reports: Reports = []

    @override
    def on_values(self, trainer: TrainerCore, values: Mapping[str, float], step: int) -> None:
        self.reports.append((step, dict(values)))


class Clipping(GradClipMixin, Trainer): ...


def parts(**options: Any) -> dict[str, Any]:
    return {**tiny_parts(), "default_callbacks": (), **options}


def reports(trainer: type[Trainer] = Trainer, samples: int = 32, **train: Any) -> Reports:
    listener = Listener()
    options = {name: train.pop(name) for name in ("log_every", "max_grad_norm", "callbacks") if name in train}
    made = trainer(**parts(**{**options, "callbacks": [listener, *options.get("callbacks", ())]}))
    length: dict[str, Any] = {"num_epochs": 1, "per_device_batch_size": 4, **train}
    made.train(tiny_data(samples), tiny_data(8), **length)
    return listener.reports


# ---- when


def test_values_are_reported_at_the_cadence_and_at_the_end_of_an_epoch() -> None:
    assert [step for step, _ in reports(samples=32, log_every=Steps(3), num_epochs=2)] == [3, 6, 8, 9, 12, 15, 16]


def test_without_a_cadence_values_are_reported_at_the_end_of_an_epoch() -> None:
    assert [step for step, _ in reports(log_every=None, num_epochs=2)] == [8, 16]


def test_an_evaluation_is_reported_with_the_values_before_it() -> None:
    found = reports(log_every=None, evaluate_every=Steps(5), evaluate_first=True)
    assert [step for step, values in found if "eval_loss" in values] == [0, 5, 8]
    assert "train_loss" not in found[0][1]


def test_a_run_that_ends_within_an_epoch_reports_its_last_steps() -> None:
    assert [step for step, _ in reports(log_every=Steps(4), max_steps=6)] == [4, 6]


def sample(index: int) -> Pair:
    inputs, target = tiny_data(16)[index]
    return inputs, target


class Endless(IterableDataset[Pair]):
    @override
    def __iter__(self) -> Iterator[Pair]:
        while True:
            yield sample(0)


def test_a_stream_keeps_every_evaluation(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    trainer = Trainer(**parts(history_file=file))
    history = trainer.train(Endless(), tiny_data(8), max_steps=50, evaluate_every=Steps(10))
    assert [record.step for record in history.evaluations] == [10, 20, 30, 40, 50]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["loss"] for line in lines if line["kind"] == "evaluation"] == [r.loss for r in history.evaluations]
    assert [line["step"] for line in lines if line["kind"] == "values"] == [10, 20, 30, 40, 50]


def test_the_end_of_a_stream_that_was_reported_is_not_reported_again() -> None:
    class Short(IterableDataset[Pair]):
        @override
        def __iter__(self) -> Iterator[Pair]:
            yield from map(sample, range(16))

    listener = Listener()
    trainer = Trainer(**parts(callbacks=[listener], log_every=Steps(1)))
    trainer.train(Short(), num_epochs=1, max_steps=9, per_device_batch_size=4)
    assert [step for step, _ in listener.reports] == [1, 2, 3, 4]


# ---- what


def test_the_loss_is_the_mean_over_the_items_since_the_last_report() -> None:
    trainer = Trainer(**parts(log_every=Steps(3)))
    history = trainer.train(tiny_data(22), num_epochs=1, per_device_batch_size=4)
    last = history.steps[3:]
    expected = sum(step.loss * step.items for step in last) / sum(step.items for step in last)
    assert [record.step for record in history.values] == [3, 6]
    assert history.values[-1].values["train_loss"] == pytest.approx(expected, rel=1e-15)


def test_a_report_has_the_rates_of_the_last_step_and_means_of_what_hooks_logged() -> None:
    trainer = Clipping(**parts(max_grad_norm=1.0))
    history = trainer.train(tiny_data(32), num_epochs=1, per_device_batch_size=4)
    (record,) = history.values
    norms = [step.logged["grad_norm"] for step in history.steps]
    assert record.values["grad_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-15)
    assert record.values["learning_rate"] == history.steps[-1].learning_rate
    assert record.values["items_per_second"] > 0


class Logging(Callback[TrainerCore]):
    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        trainer.log({"number": torch.tensor(float(step.step)), "rank": trainer.distributed.rank})
        if trainer.distributed.rank == 0:
            trainer.log({"first": 1.0})

    @override
    def on_evaluation_end(self, trainer: TrainerCore, name: str, result: EvalResult) -> None:
        trainer.log({"after": result.loss})


def test_logged_values_are_means_since_the_last_report() -> None:
    found = reports(log_every=Steps(4), callbacks=[Logging()])
    assert [values["number"] for _, values in found] == [2.5, 6.5]
    assert found[-1][1]["after"] == found[-1][1]["eval_loss"]


@pytest.mark.timeout(60)
def test_ranks_report_the_same_values_whichever_of_them_logged() -> None:
    first, second = run_ranks(lambda: reports(log_every=Steps(2), callbacks=[Logging()]), 2)
    assert [timeless(values) for _, values in first] == [timeless(values) for _, values in second]
    assert [(values["rank"], values["first"]) for _, values in first] == [(0.5, 1.0)] * 2


def test_what_a_step_logs_has_the_name_that_monitors_use() -> None:
    class Penalised(Trainer):
        @override
        def train_step(self, batch: Pair) -> StepOutput[Tensor]:
            output = super().train_step(batch)
            return StepOutput(output.loss, output.outputs, logged={"penalty": output.loss.detach()})

    ((_, values),) = reports(Penalised)
    assert values["train/penalty"] == pytest.approx(values["train_loss"], rel=1e-6)


class Accumulating(GradAccumMixin, Trainer): ...


def losses_of_split(accumulated: int, ranks: int) -> list[float]:
    made = tiny_parts()
    made["model"].double()
    inputs, targets = tiny_data(48).tensors
    data = TensorDataset(inputs.double(), targets)
    options: dict[str, Any] = {"default_callbacks": (), "log_every": Steps(3)}
    trainer = Accumulating(**{**made, **options}, gradient_accumulation_steps=accumulated)
    size = 12 // (accumulated * ranks)
    trainer.train(data, num_epochs=1, per_device_batch_size=size, train_dataloader_kwargs={"shuffle": False})
    return [record.values["train_loss"] for record in trainer.history.values]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("accumulated", "ranks"), [(2, 1), (1, 2), (2, 2), (1, 3)])
def test_values_do_not_depend_on_how_a_step_is_split(accumulated: int, ranks: int) -> None:
    expected = losses_of_split(1, 1)
    for found in run_ranks(lambda: losses_of_split(accumulated, ranks), ranks):
        assert found == pytest.approx(expected, rel=1e-12)


# ---- resumed


class KilledError(Exception):
    pass


class Kill(Callback[TrainerCore]):
    def __init__(self, step: int | None) -> None:
        self.step = step

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        if step.step == self.step:
            raise KilledError


class Saving(GradClipMixin, SeedMixin, CheckpointMixin, Trainer): ...


def train_saving(folder: Path, kill_at: int | None) -> Reports:
    listener = Listener()
    options: dict[str, Any] = {
        "checkpoint_dir": folder,
        "checkpoint_every": Steps(2),
        "checkpoint_on_exception": False,
        "resume": True,
        "history_file": folder / "history.jsonl",
        "log_every": Steps(3),
        "max_grad_norm": 1.0,
        "seed": 0,
    }
    trainer = Saving(**parts(callbacks=[listener, Logging(), Kill(kill_at)], **options))
    trainer.train(tiny_data(32), tiny_data(8), num_epochs=2, per_device_batch_size=4, evaluate_every=Steps(5))
    found = [(record.step, dict(record.values)) for record in trainer.history.values]
    assert listener.reports == found[len(found) - len(listener.reports) :]
    return [(step, timeless(values)) for step, values in found]


def saved_run(folder: Path, kill_at: int | None) -> tuple[Reports, list[Any]]:
    torch.manual_seed(0)
    with contextlib.suppress(KilledError):
        train_saving(folder, kill_at)
    torch.manual_seed(0)
    return train_saving(folder, None), read_lines(folder / "history.jsonl")[1:]


@pytest.mark.parametrize("kill_at", range(1, 16))
def test_a_resumed_run_reports_each_value_once_to_the_last_bit(kill_at: int, tmp_path: Path) -> None:
    assert saved_run(tmp_path / "killed", kill_at) == saved_run(tmp_path / "whole", None)


# ---- ended without a checkpoint


class EndedBy(Callback[TrainerCore]):
    def __init__(self, number: int) -> None:
        self.number = number

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        if step.step == 6:
            os.kill(os.getpid(), self.number)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_ends_without_a_checkpoint_has_written_what_was_due(number: int, tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"

    def train() -> None:
        trainer = Trainer(**parts(callbacks=[EndedBy(number)], history_file=file, log_every=Steps(2)))
        trainer.train(tiny_data(64), tiny_data(8), num_epochs=1, per_device_batch_size=4, evaluate_every=Steps(3))

    process = multiprocessing.get_context("fork").Process(target=train)
    process.start()
    process.join()
    lines = read_lines(file)
    assert [line["step"] for line in lines if line["kind"] == "values"][:3] == [2, 3, 4]
    assert [line["step"] for line in lines if line["kind"] == "evaluation"][:1] == [3]


# ---- memory, and bad input


def test_memory_holds_reports_of_the_whole_run() -> None:
    history = RunHistory()
    for step in range(5 * VALUES_IN_MEMORY):
        history.add_values(ValuesRecord(step, 1, {}))
    steps = [record.step for record in history.values]
    assert VALUES_IN_MEMORY / 3 < len(steps) <= VALUES_IN_MEMORY
    assert (steps[0], steps[-1]) == (0, 5 * VALUES_IN_MEMORY - 1)
    assert max(after - before for before, after in pairwise(steps)) <= 20


def test_a_value_that_is_not_a_scalar_is_refused() -> None:
    class Wrong(Callback[TrainerCore]):
        @override
        def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
            trainer.log({"weights": torch.ones(2)})

    with pytest.raises(OptionError, match="must be a number or a tensor with one element"):
        reports(callbacks=[Wrong()])


@pytest.mark.parametrize("name", ["train_loss", "epoch", "items_per_second"])
def test_a_name_that_every_run_reports_is_refused(name: str) -> None:
    class Wrong(Callback[TrainerCore]):
        @override
        def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
            trainer.log({name: 1.0})

    with pytest.raises(OptionError, match="every run reports a value of this name"):
        reports(callbacks=[Wrong()])


def test_the_name_of_a_metric_is_refused() -> None:
    class Wrong(Callback[TrainerCore]):
        @override
        def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
            trainer.log({"test/loss": 1.0})

    trainer = Trainer(**parts(callbacks=[Wrong()]))
    with pytest.raises(LossError, match="'test/loss' was logged, and is the name of a metric"):
        trainer.train(tiny_data(8), {"test": tiny_data(8)}, num_epochs=1)


def test_values_are_logged_in_a_run_only() -> None:
    with pytest.raises(NoRunError, match="outside of a run"):
        Trainer(**parts()).log({"a": 1.0})


@pytest.mark.parametrize("cadence", [50, "epoch", True])
def test_a_cadence_is_required(cadence: object) -> None:
    with pytest.raises(OptionError, match="must be a cadence, such as"):
        Trainer(**parts(log_every=cadence))
