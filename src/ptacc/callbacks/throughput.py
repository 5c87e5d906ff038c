"""Measure the speed of training."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from typing_extensions import override

from ptacc.core.callback import Callback
from ptacc.core.hooks import TrainerCore
from ptacc.data.wrappers import Batches, ObservedSource
from ptacc.profiling.hardware import PEAK_FLOPS, peak_host_memory
from ptacc.profiling.throughput import ThroughputCounter, ThroughputRecord
from ptacc.profiling.work_timer import WorkTimer
from ptacc.run.step_result import StepResult
from ptacc.types.outputs import EpochRecord
from ptacc.validation import check_at_least, check_positive

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

RECORDS_IN_MEMORY = 1000


class Throughput(Callback[TrainerCore]):
    """Measures items, samples and steps per second, the time spent waiting for data, FLOPS utilisation and memory.

    At the end of each epoch, or every `every` steps, a `ThroughputRecord` covers the steps since the last one. Its
    values are logged with that step and appear in the history. `reports` has the last 1,000 records, and `summary()`
    covers the whole run.

    The measured time is training: loading the batches of a step, its forward and backward passes, its update, and the
    hooks and callbacks that follow it. Not measured are evaluations, checkpoints, the time between two epochs, and the
    first `warmup` steps.

    Time is measured on the host, which synchronises with the device once per record and before each evaluation. Steps
    in between run asynchronously, as without this callback. For a checkpoint, the measurement stops when the host ends
    the step, without synchronising: what the device has left to do then counts as time of the checkpoint.

    With several processes, a record names the rank whose own work took longest, in one collective: loading data, and
    forward passes. FSDP and tensor parallelism have ranks wait for each other in forward passes too, so that only slow
    data shows.

    Args:
        every: Steps between two records, at least 1; by default there is one record per epoch, and for data without a
            length one at the end of the run. An epoch ends with a record of its remaining steps. The history has the
            mean of an epoch's records.
        warmup: The number of steps at the start of a run that are not measured, at least 0.
        flops_per_item: Floating-point operations of the forward and backward passes per item that the loss is a mean
            over. For a transformer, about 6 times the number of parameters per token.
        measure_flops: Whether to count these operations in the first step if `flops_per_item` is not given. It uses
            torch's `FlopCounterMode`, which counts matrix products and convolutions, but not those in compiled
            kernels, and which counts recomputed forward passes: for compiled models and models with activation
            checkpointing, give `flops_per_item`.
        peak_flops: Floating-point operations per second of one device in the precision of the run; by default from a
            table of GPUs for bf16 and fp16, otherwise unknown.

    Raises:
        OptionError: A number is out of range.
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
        owner = "Throughput"
        if every is not None:
            check_at_least(owner, "every", every, 1)
        check_at_least(owner, "warmup", warmup, 0)
        for name, value in (("flops_per_item", flops_per_item), ("peak_flops", peak_flops)):
            if value is not None:
                check_positive(owner, name, value)
        self._every, self._warmup, self._given_peak = every, warmup, peak_flops
        self._given_flops, self._measures_flops = flops_per_item, measure_flops and flops_per_item is None
        self._reset()

    def _reset(self) -> None:
        self._counter, self._last_counter = ThroughputCounter(), ThroughputCounter()
        self._records: deque[ThroughputRecord] = deque(maxlen=RECORDS_IN_MEMORY)
        self._device, self._is_single_process = torch.device("cpu"), True
        self._timer: WorkTimer | None = None
        self._peak: float | None = None
        self._flops_per_item = self._given_flops
        self._flop_counter: FlopCounterMode | None = None
        self._samples: int | None = 0
        self._samples_of_next_step: int | None = 0
        self._data_seconds, self._step_ended_at, self._step = 0.0, 0.0, 0
        self._is_in_epoch, self._is_warm = False, self._warmup == 0

    @property
    def reports(self) -> Sequence[ThroughputRecord]:
        """The last 1,000 records of the current run, or of the last one."""
        return tuple(self._records)

    def summary(self) -> ThroughputRecord:
        """Return one record for all measured steps of the current run, or of the last one."""
        return self._with_hardware(self._counter.record_since(ThroughputCounter(), self._step, self._step_ended_at))

    # ---- events

    @override
    def on_run_start(self, trainer: TrainerCore) -> None:
        self._reset()
        self._device, self._is_single_process = trainer.device, trainer.distributed.world_size == 1
        peak = find_peak_flops(trainer) if self._given_peak is None else self._given_peak
        self._peak = None if peak is None else peak * trainer.distributed.world_size
        trainer.run.data = ObservedSource(trainer.run.data, self._time_loading)
        if not self._is_single_process:
            self._timer, engine = WorkTimer(trainer.device), trainer.run.engine
            vars(engine)["backward"] = partial(self._timer.backward, engine.backward)  # the engine is of this run alone

    @override
    def on_epoch_start(self, trainer: TrainerCore) -> None:
        self._is_in_epoch = True

    @override
    def on_step_start(self, trainer: TrainerCore) -> None:
        self._samples, self._samples_of_next_step = self._samples_of_next_step, 0
        if self._timer is not None:
            self._timer.start()
        if self._measures_flops and self._flops_per_item is None:
            from torch.utils.flop_counter import FlopCounterMode

            self._stop_flop_counter()  # the gradient scaler may have skipped the step before
            self._flop_counter = FlopCounterMode(display=False)
            self._flop_counter.__enter__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        if self._flop_counter is not None:
            self._flops_per_item = self._stop_flop_counter() * trainer.distributed.world_size / step.items
        self._counter.add_step(step.items, self._samples, self._data_seconds)
        self._data_seconds, self._step, self._step_ended_at = 0.0, step.step, time.perf_counter()
        steps = self._counter.steps - self._last_counter.steps
        if not self._is_warm and steps == self._warmup:
            self._counter, self._is_warm = ThroughputCounter(started_at=self._synchronized_time()), True
            if self._timer is not None:
                self._timer.pop_seconds()
        elif self._is_warm and (steps == self._every or trainer.run.is_epoch_complete or trainer.run.is_done()):
            self._record(trainer, step)

    @override
    def on_evaluation_start(self, trainer: TrainerCore, name: str) -> None:
        self._pause()

    @override
    def on_prediction_start(self, trainer: TrainerCore) -> None:
        self._pause()

    @override
    def on_save(self, trainer: TrainerCore, path: str) -> None:
        self._counter.stop(self._step_ended_at)

    @override
    def on_epoch_end(self, trainer: TrainerCore, record: EpochRecord) -> None:
        self._counter.stop(self._step_ended_at)
        self._is_in_epoch, self._data_seconds = False, 0.0

    @override
    def on_exception(self, trainer: TrainerCore, error: BaseException) -> None:
        self._stop_flop_counter()
        self._counter.stop(self._step_ended_at)

    # ---- measuring

    def _time_loading(self, batches: Batches) -> Batches:
        """Measure how long each batch of an epoch takes to load, and count its samples."""
        if not self._is_in_epoch:  # the data is used for something else, after the last step
            yield from batches
            return
        while True:
            started_at = time.perf_counter()
            self._counter.start(started_at)
            batch = next(batches, None)
            self._data_seconds += time.perf_counter() - started_at
            if batch is None:
                return
            samples = batch.samples if self._is_single_process and batch.total is None else batch.total
            loaded = self._samples_of_next_step
            self._samples_of_next_step = None if loaded is None or samples is None else loaded + samples
            yield batch

    def _pause(self) -> None:
        if self._counter.started_at is not None:
            self._counter.stop(self._synchronized_time())

    def _record(self, trainer: TrainerCore, step: StepResult) -> None:
        now = self._synchronized_time()
        self._counter.stop(now)
        record = self._with_hardware(self._counter.record_since(self._last_counter, step.step, now))
        if self._timer is not None:
            times = trainer.distributed.gather(record.data_seconds + self._timer.pop_seconds())
            slowest, mean = max(times), sum(times) / len(times)
            ratio = slowest / mean if mean else 1.0
            record = replace(record, slowest_rank=times.index(slowest), slowest_rank_ratio=ratio)
        self._last_counter = replace(self._counter)
        self._counter.start(now)
        self._records.append(record)
        step.logged |= record.values()

    def _synchronized_time(self) -> float:
        """Return the time after the device has finished its queued work."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()

    def _with_hardware(self, record: ThroughputRecord) -> ThroughputRecord:
        device_memory = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None
        return replace(
            record,
            flops_per_item=self._flops_per_item,
            peak_flops=self._peak,
            host_memory=peak_host_memory(),
            device_memory=device_memory,
        )

    def _stop_flop_counter(self) -> int:
        counter, self._flop_counter = self._flop_counter, None
        if counter is None:
            return 0
        counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        return counter.get_total_flops()


def find_peak_flops(trainer: TrainerCore) -> float | None:
    """Return the peak FLOPS of a device in bf16 and fp16, None if unknown or if matrix products are in float32."""
    dtypes = {parameter.dtype for parameter in trainer.unwrapped_model.parameters()}
    is_half = dtypes <= {torch.bfloat16, torch.float16} or trainer.accelerator.mixed_precision in ("bf16", "fp16")
    has_name = is_half and trainer.device.type == "cuda"
    return PEAK_FLOPS.get(torch.cuda.get_device_name(trainer.device)) if has_name else None
