"""Compare a trainer on one GPU with a plain PyTorch loop.

The trainer and the plain loop run alternating blocks of steps in the same process, each with its own model. Each ratio
compares two consecutive blocks, so other load on the machine affects both. The benchmark synchronizes with the GPU
before and after a block, but not within it. It reports the 95 % bootstrap interval of the median ratio. It measures the
peak memory of each loop separately, before the blocks. After the blocks it counts the synchronizations with the GPU
that torch reports.

The plain loop is optimized: it indexes its data one batch at a time, and copies asynchronously from pinned memory.

    python -m benchmarks.gpu --json gpu.json
    python -m benchmarks.gpu --device cpu --quick     # only verifies that it runs
"""

import argparse
import contextlib
import gc
import json
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler
from typing_extensions import override

from benchmarks.gpu_tasks import CASES, Case, Task
from ptacc import AMPMixin, Callback, CompileMixin, StepResult, StopOnNonFinite, Trainer, TrainerCore

WARM_STEPS = 20
"""Steps before the measurement, in which kernels are selected and models are compiled."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


# ---- the two loops


class Mixed(AMPMixin, Trainer): ...


class Compiled(CompileMixin, Mixed): ...


def train(case: Case, task: Task, pins: bool, callback: Callback[Trainer]) -> None:
    """Run a trainer until the callback stops it."""
    model = task.make_model()
    kind = Compiled if case.is_compiled else Mixed
    trainer = kind(
        model,
        loss_func=task.loss,
        optimizer=task.make_optimizer(model),
        mixed_precision=case.precision,
        default_callbacks=[StopOnNonFinite()],
        callbacks=[callback],
    )
    kwargs: Any = {"pin_memory": pins}
    trainer.train(
        task.make_data(), max_steps=10**9, per_device_batch_size=task.batch_size, train_dataloader_kwargs=kwargs
    )


def plain_steps(case: Case, task: Task, pins: bool, device: torch.device) -> Iterator[None]:
    """Run one step of a plain loop per iteration."""
    model = task.make_model().to(device)
    optimizer, dtype = task.make_optimizer(model), DTYPES.get(case.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=case.precision == "fp16")
    forward: Any = torch.compile(model) if case.is_compiled else model
    data = task.make_data()
    batches: Sampler[Any] = BatchSampler(RandomSampler(data), task.batch_size, drop_last=False)
    loader = DataLoader(data, batch_size=None, sampler=batches, pin_memory=pins)
    while True:
        for inputs, targets in loader:
            inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                loss = task.loss(forward(inputs), targets)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            del inputs, targets, loss
            yield


# ---- measuring


class Device:
    """Operations that differ between a GPU and a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.torch_device, self.is_gpu = device, device.type == "cuda"

    def now(self) -> float:
        """Synchronize with the GPU, and return the time."""
        if self.is_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def measure_peak_memory(self, body: Callable[[], object]) -> int | None:
        """Return the peak of the additional GPU memory of a function in bytes, or None on a CPU."""
        gc.collect()
        if not self.is_gpu:
            return None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        body()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    @contextlib.contextmanager
    def count_syncs(self, counts: list[int]) -> Generator[None]:
        """Append the number of synchronizations with the GPU within the context. On a CPU, append nothing."""
        if not self.is_gpu:
            yield
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("called a synchronizing" in str(warning.message) for warning in caught))


class StopAfter(Callback[TrainerCore]):
    """Stops a run after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        if step.step == self.steps:
            trainer.stop("measured")


@dataclass
class AlternatingBlocks(Callback[TrainerCore]):
    """Runs a block of the plain loop after each block of the trainer, and measures both.

    Args:
        device: The device to measure.
        plain: The plain loop, one step per iteration.
        block_seconds: The approximate duration of a block.
        pairs: The number of pairs of blocks.
    """

    device: Device
    plain: Iterator[None]
    block_seconds: float
    pairs: int
    size: int = WARM_STEPS
    seconds: list[tuple[float, float]] = field(default_factory=list)
    syncs: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    _finished_blocks: int = 0
    _remaining_steps: int = WARM_STEPS
    _started: float = 0.0
    _sync_counter: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        self._remaining_steps -= 1
        if self._remaining_steps == 0:
            self._sync_counter.close()
            self._end_block(self.device.now() - self._started)
            if self._finished_blocks == self.pairs + 2:
                trainer.stop("measured")
            elif self._finished_blocks == self.pairs + 1:
                self._sync_counter.enter_context(self.device.count_syncs(self.syncs[0]))
            self._remaining_steps, self._started = self.size, self.device.now()

    def _end_block(self, seconds: float) -> None:
        """Run a block of the plain loop. The first block is a warm-up, and the last counts synchronizations."""
        is_first, is_last = self._finished_blocks == 0, self._finished_blocks == self.pairs + 1
        started = self.device.now()
        with self.device.count_syncs(self.syncs[1]) if is_last else contextlib.nullcontext():
            self._run_plain()
        plain = self.device.now() - started
        if is_first:
            started = self.device.now()
            self._run_plain()
            self.size = max(1, round(self.block_seconds * self.size / (self.device.now() - started)))
        elif not is_last:
            self.seconds.append((seconds / self.size, plain / self.size))
        self._finished_blocks += 1

    def _run_plain(self) -> None:
        for _ in range(self.size):
            next(self.plain)


@dataclass(frozen=True)
class Figure:
    """The result of a case: microseconds per step, and ratios of the trainer to the plain loop."""

    case: str
    plain_us: float
    ptacc_us: float
    ratio: float
    ratio_low: float
    ratio_high: float
    steps: int
    memory_ratio: float | None
    syncs_per_step: tuple[float, float] | None


def bootstrap_interval(ratios: list[float], draws: int = 2000) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[round(0.025 * draws)], medians[round(0.975 * draws) - 1]


def measure(name: str, device: Device, pairs: int, block_seconds: float, *, quick: bool) -> Figure:
    case = CASES[name]
    task, pins = case.make_task(quick), case.pins and device.is_gpu

    def run_plain_loop() -> None:
        steps = plain_steps(case, task, pins, device.torch_device)
        for _ in range(WARM_STEPS):
            next(steps)

    def run_trainer() -> None:
        train(case, task, pins, StopAfter(WARM_STEPS))

    peaks = [device.measure_peak_memory(body) for body in (run_plain_loop, run_trainer)]
    blocks = AlternatingBlocks(device, plain_steps(case, task, pins, device.torch_device), block_seconds, pairs)
    train(case, task, pins, blocks)
    ratios = [trainer / plain for trainer, plain in blocks.seconds]
    memory = peaks[1] / peaks[0] if peaks[0] and peaks[1] else None
    syncs = (blocks.syncs[0][0] / blocks.size, blocks.syncs[1][0] / blocks.size) if device.is_gpu else None
    ptacc_us, plain_us = (1e6 * statistics.median(column) for column in zip(*blocks.seconds, strict=True))
    median, (low, high) = statistics.median(ratios), bootstrap_interval(ratios)
    return Figure(name, plain_us, ptacc_us, median, low, high, blocks.size * pairs, memory, syncs)


def print_figure(figure: Figure) -> None:
    memory = "-" if figure.memory_ratio is None else f"{figure.memory_ratio:.3f}"
    syncs = "-" if figure.syncs_per_step is None else "{:.2f} / {:.2f}".format(*figure.syncs_per_step)
    spread = f"{figure.ratio:.3f} ({figure.ratio_low:.3f} to {figure.ratio_high:.3f})"
    print(
        f"{figure.case:20} {figure.plain_us:10.0f} {figure.ptacc_us:10.0f}   {spread:24} {memory:>7}   {syncs}",
        flush=True,
    )


def describe_environment(device: torch.device) -> dict[str, str]:
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU ({platform.machine()})",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "accelerate": version("accelerate"),
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="the device to measure")
    parser.add_argument("--quick", action="store_true", help="tiny models and few blocks, only to verify that it runs")
    parser.add_argument("--only", nargs="+", choices=CASES, help="run only these cases")
    parser.add_argument("--pairs", type=int, default=40, help="pairs of blocks per case")
    parser.add_argument("--seconds", type=float, default=0.25, help="approximate duration of a block")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()

    device = torch.device(args.device)
    environment = describe_environment(device)
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    print(
        f"{'':20} {'plain us':>10} {'ptacc us':>10}   {'ratio (95 %)':24} {'memory':>7}   syncs per step, ptacc / plain"
    )
    pairs, seconds = (4, 0.02) if args.quick else (args.pairs, args.seconds)
    figures: list[Figure] = []
    for name in args.only or CASES:
        if CASES[name].precision == "fp16" and device.type == "cpu":
            print(f"{name:20} needs a GPU")
            continue
        torch.manual_seed(0)
        figures.append(measure(name, Device(device), pairs, seconds, quick=args.quick))
        print_figure(figures[-1])
    if args.json:
        args.json.write_text(
            json.dumps({**environment, "figures": [asdict(figure) for figure in figures]}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
