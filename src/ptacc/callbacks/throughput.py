"""How fast training is."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from typing_extensions import override

from ptacc.core.callback import Callback
from ptacc.core.hooks import TrainerCore
from ptacc.data.wrappers import Batches, ObservedSource
from ptacc.profiling.hardware import known_peak, peak_host_memory, start_counting
from ptacc.profiling.throughput import ThroughputCounter, ThroughputRecord
from ptacc.run.history import StepResult
from ptacc.types.outputs import EpochRecord
from ptacc.validation import check_at_least, check_positive

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

REPORTS_IN_MEMORY = 1000


class Throughput(Callback[TrainerCore]):
    """Tells how fast training is: items, samples and steps a second, waiting for data, use of the device, memory.

    At the end of each epoch, or every `every` steps, it makes a `ThroughputRecord` of the steps since the last one. Its
    values are logged by that step, so that the history has them. `reports` has the last 1,000 of them, and
    `summary()` covers the whole run.

    Time is the host's. A device works behind the host, by as much as its queue holds; so the host waits for it once at
    each report and before each evaluation, and in no other step: over the steps in between, the loop is as fast as the
    slower of both. Nothing is read from the device.

    What counts is training: loading a step's data, its batches, its update, and what hooks and callbacks do after it.
    Evaluations do not count, checkpoints neither, nor what happens between two epochs, nor the first `warmup` steps. A
    checkpoint's time begins where the host has ended the step; what the device still had to do then counts as its own.
    """

    def __init__(
        self,
        *,
        every: int | None = None,
        warmup: int = 1,
        flops_per_item: float | None = None,
        measure_flops: bool = False,
        peak_flops: float | None = None,
    ) -> None:
        """Report the speed of training.

        Args:
            every: Steps between two reports, at least 1; if not given, there is one at the end of each epoch, and on
                data without a length one at the run's end. An epoch ends with a report of the steps that are left; its
                record in the history has the mean of its reports.
            warmup: Steps at the start of a run that are left out, at least 0.
            flops_per_item: Floating-point operations of the forward and backward pass, for each item that the loss is a
                mean over. For a transformer about 6 times its parameters for each token.
            measure_flops: Whether to count these operations in the run's first step, where they were not given: what
                torch's `FlopCounterMode` knows, matrix products and convolutions. It sees neither into the kernels of
                a compiler nor which passes were made twice: for compiled or checkpointed models, give them.
            peak_flops: What one device can do of them in a second, in the precision of the run; if not given, from a
                small table of GPUs for bf16 and fp16, and unknown for others.

        Raises:
            OptionError: A number that cannot be right.
        """
        owner = "Throughput"
        if every is not None:
            check_at_least(owner, "every", every, 1)
        check_at_least(owner, "warmup", warmup, 0)
        for name, value in (("flops_per_item", flops_per_item), ("peak_flops", peak_flops)):
            if value is not None:
                check_positive(owner, name, value)
        self._every, self._warmup, self._given_peak = every, warmup, peak_flops
        self._given_flops, self._measures = flops_per_item, measure_flops and flops_per_item is None
        self._begin()

    def _begin(self) -> None:
        self._tally, self._reported = ThroughputCounter(), ThroughputCounter()
        self._reports: deque[ThroughputRecord] = deque(maxlen=REPORTS_IN_MEMORY)
        self._device, self._is_alone = torch.device("cpu"), True
        self._peak: float | None = None
        self._flops = self._given_flops
        self._counter: FlopCounterMode | None = None
        self._samples: int | None = 0  # of the present step, and of what was loaded for the next
        self._loaded: int | None = 0
        self._waited, self._ended, self._step = 0.0, 0.0, 0
        self._is_in_epoch, self._is_warm = False, self._warmup == 0

    @property
    def reports(self) -> Sequence[ThroughputRecord]:
        """The last 1,000 reports of the present run, or of the last one."""
        return tuple(self._reports)

    def summary(self) -> ThroughputRecord:
        """Return what the present run, or the last one, did so far after its warm-up: all of it in one stretch."""
        return self._complete(self._tally.between(ThroughputCounter(), self._step, self._ended))

    # ---- what is heard

    @override
    def on_run_start(self, trainer: TrainerCore) -> None:
        """Begin anew."""
        self._begin()
        self._device, self._is_alone = trainer.device, trainer.distributed.world_size == 1
        peak = self._given_peak
        if peak is None and is_in_half_precision(trainer):
            peak = known_peak(trainer.device)
        self._peak = None if peak is None else peak * trainer.distributed.world_size
        trainer.run.data = ObservedSource(trainer.run.data, self._timed)

    @override
    def on_epoch_start(self, trainer: TrainerCore) -> None:
        """Heed how data is loaded, from here on."""
        self._is_in_epoch = True

    @override
    def on_step_start(self, trainer: TrainerCore) -> None:
        """Know the step's samples, and count the operations of the first step."""
        self._samples, self._loaded = self._loaded, 0
        if self._measures and self._flops is None:
            self._stop_counting()  # of a step that the scaler skipped
            self._counter = start_counting()

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        """Count the step, and report where it is time to."""
        if self._counter is not None:
            self._flops = self._stop_counting() * trainer.distributed.world_size / step.items
        self._tally.add_step(step.items, self._samples, self._waited)
        self._waited, self._step, self._ended = 0.0, step.step, time.perf_counter()
        if not self._is_warm:
            self._warm_up()
        elif self._is_due(trainer):
            self._report(step)

    @override
    def on_evaluation_start(self, trainer: TrainerCore, name: str) -> None:
        """Stop the watch."""
        self._pause()

    @override
    def on_prediction_start(self, trainer: TrainerCore) -> None:
        """Stop the watch."""
        self._pause()

    @override
    def on_save(self, trainer: TrainerCore, path: str | Path) -> None:
        """Have the watch stopped at the end of the step, after which this was saved."""
        self._tally.stop(self._ended)

    @override
    def on_epoch_end(self, trainer: TrainerCore, record: EpochRecord) -> None:
        """Have the watch stopped at the end of the epoch's last step."""
        self._tally.stop(self._ended)
        self._is_in_epoch, self._waited = False, 0.0

    @override
    def on_exception(self, trainer: TrainerCore, error: BaseException) -> None:
        """Leave nothing behind."""
        self._stop_counting()
        self._tally.stop(self._ended)

    # ---- how it is done

    def _timed(self, batches: Batches) -> Batches:
        """Take the time that each batch is waited for."""
        if not self._is_in_epoch:  # somebody else has a use for the data, after the last step
            yield from batches
            return
        while True:
            asked = time.perf_counter()
            self._tally.start(asked)
            batch = next(batches, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            samples = batch.samples if self._is_alone and batch.total is None else batch.total
            self._loaded = None if self._loaded is None or samples is None else self._loaded + samples
            yield batch

    def _pause(self) -> None:
        if self._tally.since is not None:
            self._tally.stop(self._now())

    def _warm_up(self) -> None:
        if self._tally.steps == self._warmup:
            self._tally, self._is_warm = ThroughputCounter(since=self._now()), True

    def _is_due(self, trainer: TrainerCore) -> bool:
        steps = self._tally.steps - self._reported.steps
        return steps == self._every or trainer.run.is_epoch_complete or trainer.run.is_done()

    def _report(self, step: StepResult) -> None:
        now = self._now()
        self._tally.stop(now)
        report = self._complete(self._tally.between(self._reported, step.step, now))
        self._reported = replace(self._tally)
        self._tally.start(now)
        self._reports.append(report)
        step.logged |= report.values()

    def _now(self) -> float:
        """Return the time at which the device has done all that it was given."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()

    def _complete(self, counted: ThroughputRecord) -> ThroughputRecord:
        on_device = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None
        return replace(
            counted,
            flops_per_item=self._flops,
            peak_flops=self._peak,
            host_memory=peak_host_memory(),
            device_memory=on_device,
        )

    def _stop_counting(self) -> int:
        """Return the operations that were counted."""
        counter, self._counter = self._counter, None
        if counter is None:
            return 0
        counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        return counter.get_total_flops()


def is_in_half_precision(trainer: TrainerCore) -> bool:
    """Say whether products are in bf16 or fp16: by autocast, or since the model is."""
    halves = {torch.bfloat16, torch.float16}
    by_itself = {parameter.dtype for parameter in trainer.unwrapped_model.parameters()} <= halves
    return by_itself or trainer.accelerator.mixed_precision in ("bf16", "fp16")
