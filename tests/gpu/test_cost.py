"""A trainer synchronises with the GPU no more often than a plain loop, and needs no more memory."""

import contextlib
import gc
from collections.abc import Callable
from dataclasses import field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader
from typing_extensions import override

from ptacc import (
    AMPMixin,
    EMAMixin,
    EpochRecord,
    GradClipMixin,
    LRSchedulerMixin,
    Mixin,
    StepOutput,
    StepResult,
    Trainer,
)
from ptacc.model.averaging import AveragedWeights
from ptacc.protocols import Precision
from tests.gpu.parts import BATCH, DTYPES, make_data, make_net
from tests.gpu.waits import Waits

STEPS = 12
MEASURED = range(3, STEPS)
"""The numbers of the measured steps; each is measured from the end of the step before."""


# ---- synchronisation


class WaitCounter(Mixin):
    """Counts how often the host waits for the GPU in the measured steps and between them."""

    waits: Waits = field(init=False, default_factory=Waits)
    _counting: contextlib.ExitStack = field(init=False, default_factory=contextlib.ExitStack)

    @override
    def on_step_end(self, step: StepResult) -> None:
        super().on_step_end(step)
        if step.step == MEASURED[0] - 1:
            self._counting.enter_context(self.waits.counted())

    @override
    def on_step_start(self) -> None:
        super().on_step_start()
        if self.progress.steps == MEASURED[-1]:
            self._counting.close()

    @override
    def on_epoch_end(self, record: EpochRecord) -> None:
        self._counting.close()
        super().on_epoch_end(record)


class Measured(WaitCounter, AMPMixin, GradClipMixin, LRSchedulerMixin, EMAMixin, Trainer): ...


class ReadsLoss(Measured):
    """Reads the loss in each step."""

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        output = super().train_step(batch)
        assert output.loss.item() > 0
        return output


def count_waits(kind: type[Measured], precision: Precision, *, fused: bool) -> int:
    net = make_net()
    trainer = kind(
        net,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=AdamW(net.parameters(), lr=1e-3, fused=fused),
        mixed_precision=precision,
        max_grad_norm=0.5,
        ema_decay=0.9,
        create_scheduler=lambda optimizer, plan: StepLR(optimizer, 1, gamma=0.9),
    )
    trainer.train(make_data(STEPS * BATCH), num_epochs=1, per_device_batch_size=BATCH)
    assert trainer.progress.steps == STEPS
    return trainer.waits.count


def count_plain_waits(device: torch.device, precision: Precision, *, fused: bool) -> int:
    """Return how often a plain loop with the same steps waits."""
    net = make_net().to(device)
    average = AveragedWeights(net)
    optimizer = AdamW(net.parameters(), lr=1e-3, fused=fused)
    scheduler = StepLR(optimizer, 1, gamma=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    dtype, waits = DTYPES.get(precision), Waits()
    loader = DataLoader(make_data(STEPS * BATCH), BATCH, shuffle=True, pin_memory=True)
    for number, (inputs, targets) in enumerate(loader, start=1):
        with waits.counted() if number in MEASURED else contextlib.nullcontext():
            inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                outputs = net(inputs)
            scaler.scale(nn.functional.cross_entropy(outputs.float(), targets)).backward()  # type: ignore[no-untyped-call]
            scaler.unscale_(optimizer)
            clip_grad_norm_(net.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scheduler.step()
            average.update(net, 0.1)
    return waits.count


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_step_synchronises_no_more_often_than_a_plain_loop(device: torch.device, precision: Precision) -> None:
    expected = len(MEASURED) if precision == "fp16" else 0  # the scaler reads whether the gradients overflowed
    assert count_plain_waits(device, precision, fused=False) == expected
    assert count_waits(Measured, precision, fused=False) == expected


def test_a_fused_optimizer_synchronises_once_per_step_in_fp16(device: torch.device) -> None:
    # The plain loop does not read it, and updates its schedule and its average after skipped steps too.
    assert count_plain_waits(device, "fp16", fused=True) == 0
    assert count_waits(Measured, "fp16", fused=True) == len(MEASURED)


def test_reading_a_loss_synchronises() -> None:
    assert count_waits(ReadsLoss, "no", fused=False) == len(MEASURED)


# ---- memory

LARGE: dict[str, Any] = {"features": 256, "hidden": 1024, "layers": 12}
LARGE_BATCH = 4096


def make_large() -> tuple[nn.Module, Optimizer]:
    net = make_net(**LARGE)
    return net, AdamW(net.parameters(), lr=1e-4)


def measure_peak(body: Callable[[], object]) -> int:
    """Return the peak GPU memory of a function in bytes."""
    gc.collect()  # delete the trainers of earlier tests
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    body()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Mixed(AMPMixin, Trainer): ...


def train_large(precision: Precision) -> None:
    net, optimizer = make_large()
    trainer = Mixed(
        net, loss_func=nn.CrossEntropyLoss(), optimizer=optimizer, mixed_precision=precision, default_callbacks=()
    )
    data = make_data(8 * LARGE_BATCH, LARGE["features"])
    trainer.train(data, num_epochs=1, per_device_batch_size=LARGE_BATCH)


def train_large_plainly(device: torch.device, precision: Precision) -> None:
    net, _ = make_large()
    net.to(device)
    optimizer = AdamW(net.parameters(), lr=1e-4)
    dtype = DTYPES.get(precision)
    data = make_data(8 * LARGE_BATCH, LARGE["features"])
    for inputs, targets in DataLoader(data, LARGE_BATCH, shuffle=True, pin_memory=True):
        inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            outputs = net(inputs)
        loss = nn.functional.cross_entropy(outputs.float(), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        del inputs, targets, outputs, loss


def test_no_memory_of_the_gpu_is_used_after_a_run() -> None:
    train_large("bf16")
    gc.collect()
    before = torch.cuda.memory_allocated()
    train_large("bf16")
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 1 << 20


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_peak_memory_equals_a_plain_loops(device: torch.device, precision: Precision) -> None:
    train_large_plainly(device, precision)  # so that cuBLAS has allocated its workspace
    train_large(precision)
    plain, ours = (
        measure_peak(lambda: train_large_plainly(device, precision)),
        measure_peak(lambda: train_large(precision)),
    )
    assert plain > LARGE_BATCH * LARGE["hidden"] * LARGE["layers"]
    assert ours / plain == pytest.approx(1, abs=0.02)
