import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.data import Dataset, IterableDataset
from typing_extensions import override

from ptacc import (
    Callback,
    CheckpointMixin,
    EpochRecord,
    GradAccumMixin,
    StepOutput,
    Steps,
    SWAMixin,
    Throughput,
    Trainer,
    TrainerCore,
    TrainingLoop,
)
from ptacc.callbacks import throughput
from ptacc.engines.default import TorchEngine
from ptacc.errors import OptionError
from ptacc.profiling import work_timer
from ptacc.protocols import DataLoaderKwargs, Engine, ThroughputRecord
from ptacc.run.history import STEPS_IN_MEMORY
from ptacc.run.step_result import StepResult
from ptacc.testing import iris, iris_parts, tiny_data, tiny_parts
from tests.ranks import run_ranks

LOADING, FORWARD, EVALUATING, SAVING, EPOCH_END, STEP_END = 0.25, 2.0, 16.0, 256.0, 4096.0, 0.5
"""Seconds on the fake clock: per sample, per batch, per evaluated batch, per checkpoint, and per call of a callback."""


class Clock:
    """A fake clock, advanced by the code under test."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(throughput, "time", made)
    return made


class Slow(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, clock: Clock, samples: int = 24) -> None:
        self.clock, self.tensors, self.seconds = clock, tiny_data(samples).tensors, LOADING

    def __len__(self) -> int:
        return len(self.tensors[0])

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.clock.now += self.seconds
        return self.tensors[0][index], self.tensors[1][index]


class SlowTrainer(CheckpointMixin, GradAccumMixin, SWAMixin, Trainer):
    clock: Clock

    @override
    def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.clock.now += FORWARD
        return super().compute_train_loss(outputs, targets)

    @override
    def compute_eval_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.clock.now += EVALUATING
        return super().compute_eval_loss(outputs, targets)


class SlowCallback(Callback[TrainerCore]):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        self.clock.now += STEP_END

    @override
    def on_epoch_end(self, trainer: TrainerCore, record: EpochRecord) -> None:
        self.clock.now += EPOCH_END

    def state_dict(self) -> dict[str, Any]:
        self.clock.now += SAVING
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def train_slowly(clock: Clock, folder: Path, callback: Throughput, **options: Any) -> SlowTrainer:
    """Train two epochs of three steps with an evaluation every two steps, a checkpoint every step, and SWA."""
    trainer = SlowTrainer(
        **tiny_parts(),
        clock=clock,
        callbacks=[SlowCallback(clock), callback],
        checkpoint_dir=folder,
        checkpoint_every=Steps(1),
        swa_start=1,
        **options,
    )
    trainer.train(Slow(clock), Slow(clock), num_epochs=2, evaluate_every=Steps(2))
    return trainer


def train(callback: Throughput, samples: int = 24, **options: Any) -> Trainer:
    trainer = Trainer(**tiny_parts(), callbacks=[callback])
    asked: dict[str, Any] = {"num_epochs": 2, **options}
    trainer.train(tiny_data(samples), **asked)
    return trainer


# ---- time


def test_time_excludes_evaluations_checkpoints_and_the_gaps_between_epochs(clock: Clock, tmp_path: Path) -> None:
    callback = Throughput(warmup=0)
    train_slowly(clock, tmp_path, callback)
    each = 8 * LOADING + FORWARD + STEP_END
    assert [report.seconds for report in callback.reports] == [3 * each, 3 * each]
    assert callback.summary().seconds == 6 * each
    assert clock.now > 6 * SAVING + 2 * EPOCH_END + 9 * EVALUATING


def test_time_spent_waiting_for_data_is_measured(clock: Clock, tmp_path: Path) -> None:
    callback = Throughput(warmup=0)
    train_slowly(clock, tmp_path, callback, gradient_accumulation_steps=3)
    waiting, working = 24 * LOADING, 3 * FORWARD + STEP_END
    assert [report.data_seconds for report in callback.reports] == [waiting, waiting]
    assert [report.data_wait for report in callback.reports] == [waiting / (waiting + working)] * 2


def test_warmup_steps_are_not_measured(clock: Clock, tmp_path: Path) -> None:
    callback = Throughput(warmup=2)
    train_slowly(clock, tmp_path, callback)
    assert [report.steps for report in callback.reports] == [1, 3]
    assert callback.summary().steps == 4
    assert callback.summary().seconds == 4 * (8 * LOADING + FORWARD + STEP_END)


class LaterCallback(Callback[TrainerCore]):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        self.clock.now += 1.0


def test_time_of_later_callbacks_counts_for_the_next_step(clock: Clock) -> None:
    callback = Throughput(warmup=0, every=2)
    trainer = Trainer(**tiny_parts(), callbacks=[callback, LaterCallback(clock)])
    trainer.train(tiny_data(48), num_epochs=1)
    assert [report.seconds for report in callback.reports] == [1.0, 2.0, 2.0]


# ---- counts


def test_items_samples_and_steps_are_counted_per_epoch() -> None:
    callback = Throughput(warmup=0)
    train(callback, per_device_batch_size=10)
    counts = [(report.step, report.steps, report.items, report.samples) for report in callback.reports]
    assert counts == [(3, 3, 24, 24), (6, 3, 24, 24)]


def test_reports_come_every_n_steps_and_at_the_end_of_an_epoch() -> None:
    callback = Throughput(warmup=1, every=2)
    train(callback, per_device_batch_size=5)
    assert [(report.step, report.steps) for report in callback.reports] == [(3, 2), (5, 2), (7, 2), (9, 2), (10, 1)]


def test_a_report_comes_at_the_end_of_a_run_within_an_epoch() -> None:
    callback = Throughput(warmup=0)
    train(callback, num_epochs=None, max_steps=5)
    assert [(report.step, report.steps) for report in callback.reports] == [(3, 3), (5, 2)]


def test_a_stopped_run_is_in_the_summary() -> None:
    class Stopping(Trainer):
        @override
        def should_stop(self) -> str | None:
            return super().should_stop() or ("enough" if self.progress.steps == 5 else None)

    callback = Throughput(warmup=0)
    Stopping(**tiny_parts(), callbacks=[callback]).train(tiny_data(), num_epochs=2)
    assert [report.step for report in callback.reports] == [3]
    assert (callback.summary().step, callback.summary().steps) == (5, 5)


@dataclass
class Tokens:
    inputs: Tensor
    count: int


class LanguageModel(TrainingLoop[Tokens, Tensor]):
    @override
    def count_items(self, batch: Tokens) -> int:
        return batch.count

    @override
    def train_step(self, batch: Tokens) -> StepOutput[Tensor]:
        outputs: Tensor = self.model(batch.inputs)
        return StepOutput(loss=outputs.mean(), outputs=outputs)


def train_on_tokens(callback: Throughput, data: Any, **options: Any) -> None:
    net = nn.Linear(3, 1)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    trainer = LanguageModel(net, optimizer=sgd, default_callbacks=(), callbacks=[callback])
    trainer.train(data, collate_fn=lambda rows: Tokens(torch.stack(rows), 100 * len(rows)), **options)


def test_items_and_samples_are_reported_separately() -> None:
    callback = Throughput(warmup=0)
    train_on_tokens(callback, list(torch.ones(20, 3)), num_epochs=1)
    (report,) = callback.reports
    assert (report.items, report.samples) == (2000, 20)
    assert report.values()["items_per_second"] == pytest.approx(100 * report.values()["samples_per_second"])


class Stream(IterableDataset[Tensor]):
    @override
    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.ones(100, 3)


def test_a_stream_reports_at_the_end_of_the_run() -> None:
    callback = Throughput(warmup=0)
    train_on_tokens(callback, Stream(), max_steps=9)
    assert [(report.steps, report.items, report.samples) for report in callback.reports] == [(9, 7200, 72)]


def test_samples_of_prebatched_data_are_unknown() -> None:
    callback = Throughput(warmup=0)
    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    net = nn.Linear(3, 1)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)

    class Rows(TrainingLoop[Tensor, Tensor]):
        @override
        def train_step(self, batch: Tensor) -> StepOutput[Tensor]:
            return StepOutput(loss=self.model(batch).mean(), outputs=batch)

    Rows(net, optimizer=sgd, default_callbacks=(), callbacks=[callback]).train(loader, max_steps=9)
    assert (callback.summary().items, callback.summary().samples) == (27, None)
    assert "samples_per_second" not in callback.summary().values()


def test_each_run_is_counted_separately() -> None:
    callback = Throughput(warmup=0)
    trainer = train(callback)
    trainer.evaluate(tiny_data())
    trainer.train(tiny_data(), num_epochs=1)
    assert [report.steps for report in callback.reports] == [3]


def test_all_ranks_count_all_items_without_padding() -> None:
    def worker() -> tuple[float, int | None]:
        callback = Throughput(warmup=0)
        train(callback, num_epochs=1, per_device_batch_size=5)
        return callback.summary().items, callback.summary().samples

    assert run_ranks(worker, 2) == [(24, 24), (24, 24)]


# ---- the slowest rank


def train_on_ranks(monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, float], loading: float) -> Throughput:
    """Train on two ranks. Loading and forward passes take as long as is given for the rank; backward passes 50 s."""
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    monkeypatch.setattr(work_timer, "time", clock)

    class Working(Trainer):
        @override
        def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
            clock.now += seconds[self.distributed.rank]
            return super().train_step(batch)

        @override
        def backward(self, loss: Tensor) -> None:
            super().backward(loss)
            clock.now += 50.0

    callback = Throughput(warmup=0, every=2)
    trainer = Working(**tiny_parts(), callbacks=[callback])

    data = Slow(clock, 64)
    data.seconds = loading * trainer.distributed.rank
    trainer.train(data, num_epochs=1)
    return callback


@pytest.mark.parametrize(("seconds", "loading"), [((1.0, 3.0), 0.0), ((4.0, 4.0), 1.0)])
def test_a_record_names_the_rank_with_the_longest_work(
    monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, float], loading: float
) -> None:
    def worker() -> list[tuple[int | None, float | None]]:
        callback = train_on_ranks(monkeypatch, seconds, loading)
        return [(report.slowest_rank, report.slowest_rank_ratio) for report in callback.reports]

    assert run_ranks(worker, 2) == [[(1, 1.5), (1, 1.5)]] * 2


def test_a_single_process_has_no_slowest_rank() -> None:
    callback = Throughput(warmup=0)
    train(callback)
    assert [(report.slowest_rank, report.slowest_rank_ratio) for report in callback.reports] == [(None, None)] * 2
    assert "slowest_rank_ratio" not in callback.summary().values()


# ---- where the values go


def test_the_values_are_in_the_history() -> None:
    callback = Throughput(warmup=0)
    history = train(callback).history
    for epoch, report in zip(history, callback.reports, strict=True):
        assert epoch.logged == pytest.approx(report.values(), rel=1e-6)  # the history is in single precision
    assert ["data_wait" in step.logged for step in history.steps] == [False, False, True] * 2


def test_no_report_is_missing_from_the_history_of_steps() -> None:
    callback = Throughput(warmup=0, every=1)
    history = train(callback, samples=1100, num_epochs=1, per_device_batch_size=1).history
    assert len(history.steps) == STEPS_IN_MEMORY
    assert all("data_wait" in step.logged for step in history.steps)


def test_rates_are_counts_divided_by_seconds() -> None:
    measured = ThroughputRecord(
        step=9,
        steps=8,
        items=4096,
        samples=64,
        seconds=2.0,
        data_seconds=0.5,
        flops_per_item=1e6,
        peak_flops=1e10,
        host_memory=2**31,
        device_memory=2**29,
    )
    assert (measured.steps_per_second, measured.samples_per_second, measured.flops_per_second) == (4, 32, 2.048e9)
    assert measured.values() == {
        "items_per_second": 2048.0,
        "samples_per_second": 32.0,
        "data_wait": 0.25,
        "flops_utilisation": 0.2048,
        "host_memory_gib": 2.0,
        "device_memory_gib": 0.5,
    }


def test_rates_are_zero_before_the_first_step() -> None:
    empty = Throughput().summary()
    assert (empty.steps, empty.items_per_second, empty.data_wait) == (0, 0.0, 0.0)


# ---- the hardware


@pytest.mark.parametrize("accumulation", [1, 2])
def test_flops_are_counted_in_the_first_step(accumulation: int) -> None:
    class Accumulating(GradAccumMixin, Trainer): ...

    callback = Throughput(measure_flops=True)
    trainer = Accumulating(**tiny_parts(), callbacks=[callback], gradient_accumulation_steps=accumulation)
    trainer.train(tiny_data(), num_epochs=2)
    product = 2 * 4 * 2  # multiply and add, 4 inputs, 2 outputs
    assert callback.summary().flops_per_item == 2 * product  # forward, and the gradient of the weights


class Skipping(Trainer):
    """Has a gradient scaler that skips the first step, since its gradients are not finite."""

    @override
    def make_engine(self) -> Engine:
        return TorchEngine(self.accelerator, self.unwrapped_model, self.optimizer_slots(), torch.amp.GradScaler("cpu"))

    @override
    def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = super().compute_train_loss(outputs, targets)
        return loss if self.progress.batches else loss * math.inf


def test_a_skipped_step_counts_for_time_only() -> None:
    callback = Throughput(measure_flops=True, warmup=0)
    trainer = Skipping(**iris_parts(), callbacks=[callback])
    trainer.train(iris(), num_epochs=1, per_device_batch_size=30)
    assert trainer.progress.steps == 4
    assert (callback.summary().items, callback.summary().samples) == (120, 120)
    products = [4 * 16, 16 * 3, 4 * 16, 16 * 3, 16 * 3]  # forward, weight gradients, input gradient of layer 2
    assert callback.summary().flops_per_item == 2 * sum(products)


def test_counting_flops_changes_no_loss() -> None:
    in_order: DataLoaderKwargs = {"shuffle": False}
    counting, plain = (
        train(Throughput(measure_flops=flag), train_dataloader_kwargs=in_order) for flag in (True, False)
    )
    assert [step.loss for step in counting.history.steps] == [step.loss for step in plain.history.steps]


def test_utilisation_covers_all_ranks() -> None:
    def worker() -> tuple[float | None, float | None]:
        callback = Throughput(measure_flops=True, peak_flops=1e12)
        train(callback)
        return callback.summary().flops_per_item, callback.summary().peak_flops

    assert run_ranks(worker, 2) == [(32, 2e12)] * 2


def test_utilisation_is_unknown_without_a_peak() -> None:
    callback = Throughput(flops_per_item=32)
    train(callback)
    summary = callback.summary()
    assert summary.flops_per_second == 32 * summary.items_per_second
    assert summary.flops_utilisation is None
    assert "flops_utilisation" not in summary.values()


def test_host_memory_is_that_of_this_process() -> None:
    callback = Throughput()
    train(callback)
    before = callback.summary().host_memory
    held = torch.ones(2**25)
    after = callback.summary().host_memory
    assert before is not None
    assert after is not None
    assert after >= before >= 2**26
    assert after >= held.nbytes
    assert callback.summary().device_memory is None


# ---- mistakes


def test_an_exception_in_the_first_step_stops_the_flop_counter() -> None:
    class Failing(Trainer):
        @override
        def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            raise KeyError("a mistake in the loss")

    trainer = Failing(**tiny_parts(), callbacks=[Throughput(measure_flops=True)])
    with pytest.raises(KeyError):
        trainer.train(tiny_data(), num_epochs=1)
    assert _get_current_dispatch_mode() is None


@pytest.mark.parametrize(
    ("option", "value"), [("every", 0), ("warmup", -1), ("flops_per_item", 0.0), ("peak_flops", float("inf"))]
)
def test_invalid_options_are_refused(option: str, value: float) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(OptionError, match=rf"Throughput\({option}="):
        Throughput(**options)
