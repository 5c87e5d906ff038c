"""What a trainer costs on one GPU, beside a plain PyTorch loop that does the same.

A trainer runs, and after each block of its steps a plain loop runs a block of as many, in the same process, on a
model of its own: each ratio is of two neighbouring blocks, and what else the machine does is in both. The clock is
read before and after a block, when the GPU is done, and nothing waits for it within a block. A ratio comes with the
95 % interval of its median (bootstrap). Peaks of memory are taken before that, each side alone; the calls for which
the host waits for the GPU are counted after it, as far as torch notices them.

The plain loop is a fast one: it indexes its data a batch at a time, and copies from pinned memory without waiting.

    python -m benchmarks.gpu --json gpu.json
    python -m benchmarks.gpu --device cpu --quick     # only shows that it runs
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
from collections.abc import Callable, Iterator
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
"""Before anything is measured: kernels are chosen, and models compiled."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


# ---- the two sides


class Mixed(AMPMixin, Trainer): ...


class Compiled(CompileMixin, Mixed): ...


def train(case: Case, task: Task, pins: bool, listener: Callback[Trainer]) -> None:
    """Let a trainer run until the listener stops it."""
    model = task.make_model()
    kind = Compiled if case.is_compiled else Mixed
    trainer = kind(
        model,
        loss_func=task.loss,
        optimizer=task.make_optimizer(model),
        mixed_precision=case.precision,
        default_callbacks=[StopOnNonFinite()],
        callbacks=[listener],
    )
    kwargs: Any = {"pin_memory": pins}
    trainer.train(
        task.make_data(), max_steps=10**9, per_device_batch_size=task.batch_size, train_dataloader_kwargs=kwargs
    )


def plain_steps(case: Case, task: Task, pins: bool, device: torch.device) -> Iterator[None]:
    """Take a step of a loop of one's own each time."""
    model = task.make_model().to(device)
    optimizer, dtype = task.make_optimizer(model), DTYPES.get(case.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=case.precision == "fp16")
    called: Any = torch.compile(model) if case.is_compiled else model
    data = task.make_data()
    batches: Sampler[Any] = BatchSampler(RandomSampler(data), task.batch_size, drop_last=False)
    loader = DataLoader(data, batch_size=None, sampler=batches, pin_memory=pins)
    while True:
        for inputs, targets in loader:
            inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                loss = task.loss(called(inputs), targets)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            del inputs, targets, loss
            yield


# ---- measuring


class Machine:
    """What differs between a GPU and a host."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.is_gpu = device, device.type == "cuda"

    def now(self) -> float:
        """Return the time, once everything that was ordered is done."""
        if self.is_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak_of(self, body: Callable[[], object]) -> int | None:
        """Return the bytes that a body has on the GPU at most; None for a host."""
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
    def counting_waits(self, counts: list[int]) -> Iterator[None]:
        """Append how often the host waited for the GPU in the block; nothing on a host."""
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
    """Ends a run after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        if step.step == self.steps:
            trainer.stop("measured")


@dataclass
class Turns(Callback[TrainerCore]):
    """Lets a plain loop take a turn after each block of the trainer's steps, and times both.

    Args:
        machine: What to time on.
        plain: The plain loop, one step each.
        block_seconds: About how long a block takes.
        pairs: Pairs of blocks.
    """

    machine: Machine
    plain: Iterator[None]
    block_seconds: float
    pairs: int
    size: int = WARM_STEPS
    seconds: list[tuple[float, float]] = field(default_factory=list)
    waits: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    _blocks: int = 0
    _left: int = WARM_STEPS
    _started: float = 0.0
    _watching: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        self._left -= 1
        if self._left == 0:
            self._watching.close()
            self._end_block(self.machine.now() - self._started)
            if self._blocks == self.pairs + 2:
                trainer.stop("measured")
            elif self._blocks == self.pairs + 1:
                self._watching.enter_context(self.machine.counting_waits(self.waits[0]))
            self._left, self._started = self.size, self.machine.now()

    def _end_block(self, seconds: float) -> None:
        """Give the plain loop its turn: the first is to get warm, in the last waits are counted."""
        is_first, is_last = self._blocks == 0, self._blocks == self.pairs + 1
        started = self.machine.now()
        with self.machine.counting_waits(self.waits[1]) if is_last else contextlib.nullcontext():
            self._run_plain()
        plain = self.machine.now() - started
        if is_first:
            started = self.machine.now()
            self._run_plain()
            self.size = max(1, round(self.block_seconds * self.size / (self.machine.now() - started)))
        elif not is_last:
            self.seconds.append((seconds / self.size, plain / self.size))
        self._blocks += 1

    def _run_plain(self) -> None:
        for _ in range(self.size):
            next(self.plain)


@dataclass(frozen=True)
class Figure:
    """What came of a case: times of a step in microseconds, ratios of the trainer to the plain loop."""

    case: str
    plain_us: float
    ptacc_us: float
    ratio: float
    ratio_low: float
    ratio_high: float
    steps: int
    memory_ratio: float | None
    waits_per_step: tuple[float, float] | None


def interval(ratios: list[float], draws: int = 2000) -> tuple[float, float]:
    """Return the 95 % interval of the median, by bootstrap."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[round(0.025 * draws)], medians[round(0.975 * draws) - 1]


def measure(name: str, machine: Machine, pairs: int, block_seconds: float, *, quick: bool) -> Figure:
    case = CASES[name]
    task, pins = case.make_task(quick), case.pins and machine.is_gpu

    def run_plainly() -> None:
        steps = plain_steps(case, task, pins, machine.device)
        for _ in range(WARM_STEPS):
            next(steps)

    peaks = [machine.peak_of(side) for side in (run_plainly, lambda: train(case, task, pins, StopAfter(WARM_STEPS)))]
    turns = Turns(machine, plain_steps(case, task, pins, machine.device), block_seconds, pairs)
    train(case, task, pins, turns)
    ratios = [ours / plain for ours, plain in turns.seconds]
    memory = peaks[1] / peaks[0] if peaks[0] and peaks[1] else None
    waits = (turns.waits[0][0] / turns.size, turns.waits[1][0] / turns.size) if machine.is_gpu else None
    ours_us, plain_us = (1e6 * statistics.median(column) for column in zip(*turns.seconds, strict=True))
    middle, (low, high) = statistics.median(ratios), interval(ratios)
    return Figure(name, plain_us, ours_us, middle, low, high, turns.size * pairs, memory, waits)


def tell(figure: Figure) -> None:
    memory = "-" if figure.memory_ratio is None else f"{figure.memory_ratio:.3f}"
    waits = "-" if figure.waits_per_step is None else "{:.2f} / {:.2f}".format(*figure.waits_per_step)
    spread = f"{figure.ratio:.3f} ({figure.ratio_low:.3f} to {figure.ratio_high:.3f})"
    print(
        f"{figure.case:20} {figure.plain_us:10.0f} {figure.ptacc_us:10.0f}   {spread:24} {memory:>7}   {waits}",
        flush=True,
    )


def surroundings(device: torch.device) -> dict[str, str]:
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, a CPU",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "accelerate": version("accelerate"),
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="the one that trainers will find")
    parser.add_argument("--quick", action="store_true", help="tiny models and few blocks: no figures to report")
    parser.add_argument("--only", nargs="+", choices=CASES, help="these cases alone")
    parser.add_argument("--pairs", type=int, default=40, help="pairs of blocks of a case")
    parser.add_argument("--seconds", type=float, default=0.25, help="about how long a block takes")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    asked = parser.parse_args()

    device = torch.device(asked.device)
    about = surroundings(device)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(
        f"{'':20} {'plain us':>10} {'ptacc us':>10}   {'ratio (95 %)':24} {'memory':>7}   waits a step, ptacc / plain"
    )
    pairs, seconds = (4, 0.02) if asked.quick else (asked.pairs, asked.seconds)
    figures: list[Figure] = []
    for name in asked.only or CASES:
        if CASES[name].precision == "fp16" and device.type == "cpu":
            print(f"{name:20} needs a GPU")
            continue
        torch.manual_seed(0)
        figures.append(measure(name, Machine(device), pairs, seconds, quick=asked.quick))
        tell(figures[-1])
    if asked.json:
        asked.json.write_text(json.dumps({**about, "figures": [asdict(figure) for figure in figures]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
