"""Profiling a few steps with torch's profiler."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Generator
from pathlib import Path

from torch.profiler import profile, record_function, schedule
from typing_extensions import override

from ptacc.composition.guards import get_hook_shape
from ptacc.core.callback import overrides
from ptacc.core.hooks import Mixin, TrainerCore
from ptacc.data.wrappers import ObservedSource
from ptacc.profiling.trace import Profile, StepProfiler, annotate_calls, annotate_loading
from ptacc.run.state import StateKey
from ptacc.run.step_result import StepResult
from ptacc.validation import absolute_path, check_at_least

DATA, EVALUATION = "ptacc/data", "ptacc/evaluation"
TRAINER_RANGES = {
    "train_step": "ptacc/forward",
    "backward": "ptacc/backward",
    "on_gradients_ready": "ptacc/gradients_ready",
    "save_run_state": "ptacc/checkpoint",
}
ENGINE_RANGES = {"update": "ptacc/optimizer"}
"""Methods that the loop calls, each with the name of its range in the trace."""

PROFILER: StateKey[StepProfiler] = StateKey("profiler", saved=False)


class ProfilerMixin(Mixin):
    """Profiles a few steps with `torch.profiler`: a trace file per rank, and a table of the most expensive operators.

    The first steps of a run are not representative: kernels are selected and compiled, and memory is reserved. Some
    steps are therefore skipped, some warm up the profiler, and the next ones are recorded. Steps are counted from the
    start of this `train()`, even if it resumes a run. A profiled step lasts from the end of the previous step to its
    own end, and includes evaluations and checkpoints between the two.

    Named ranges in the trace: `ptacc/data`, `ptacc/forward`, `ptacc/backward`, `ptacc/gradients_ready` (hooks, such as
    clipping), `ptacc/optimizer`, `ptacc/evaluation` and `ptacc/checkpoint`.

    Rank 0 prints the table, which is also in `trainer.profiles`. If an exception ends the run, the steps recorded so
    far are written. Losses and weights are equal to the bit with and without profiling. After the last cycle, the only
    cost is one check per step.

    Options:
        profile_dir: Directory for trace files such as `rank0_step8.pt.trace.json.gz`, for https://ui.perfetto.dev and
            TensorBoard; None to write none. A later run overwrites the files of the same steps.
        profile_wait: Number of steps to skip, at least 0.
        profile_warmup: Number of steps with the profiler on whose events are discarded, at least 1.
        profile_active: Number of steps to record, at least 1.
        profile_repeat: Number of cycles of skipping, warming up and recording, at least 1.
        profile_memory: Whether to record memory allocations.
        profile_shapes: Whether to record the input shapes of operators, and to group the table by them.
        profile_stacks: Whether to record the Python call stacks of operators, in the trace only.
        profile_rows: Number of rows of the table, at least 1.

    Hooks: `around_run`, `around_evaluation`, `on_step_end`.

    Combines with: everything. Of the `on_step_end` hooks of other mixins, a profiled step includes those of classes
    after this one in the method resolution order.

    Example:
        >>> from ptacc import ProfilerMixin, Trainer
        >>> class MyTrainer(ProfilerMixin, Trainer):
        ...     profile_wait = 20
    """

    profile_dir: str | os.PathLike[str] | None = None
    profile_wait: int = 5
    profile_warmup: int = 2
    profile_active: int = 3
    profile_repeat: int = 1
    profile_memory: bool = False
    profile_shapes: bool = False
    profile_stacks: bool = False
    profile_rows: int = 15

    @override
    def check_options(self) -> None:
        owner = type(self).__name__
        check_at_least(owner, "profile_wait", self.profile_wait, 0)
        for name in ("profile_warmup", "profile_active", "profile_repeat", "profile_rows"):
            check_at_least(owner, name, getattr(self, name), 1)
        if self.profile_dir is not None:
            advice = "torch writes traces to local files only. Give a local path, and copy them from there."
            self.profile_dir = absolute_path(owner, "profile_dir", self.profile_dir, advice)

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """The profiles of the current or last run on this rank, one per cycle."""
        return tuple(self.run[PROFILER].profiles)

    @override
    @contextlib.contextmanager
    def around_run(self) -> Generator[None]:
        if self.is_isolated:
            with super().around_run():
                yield
            return
        if self.profile_dir is not None:  # an error is raised before the first step
            Path(self.profile_dir).mkdir(parents=True, exist_ok=True)
        make, profiled = functools.partial(make_profiler, self), functools.partial(report, self)
        profiler = self.run[PROFILER] = StepProfiler(make, profiled, self.profile_repeat)
        with super().around_run(), profiler.ranges:
            mark_ranges(self, profiler)
            profiler.start()
            try:
                yield
            except BaseException:
                profiler.was_interrupted = True
                raise
            finally:
                profiler.stop()
        if not profiler.profiles:
            waited, warmup = self.profile_wait, self.profile_warmup
            self.print(f"No step was profiled: the run ended within {waited} skipped and {warmup} warm-up steps.")

    @override
    @contextlib.contextmanager
    def around_evaluation(self) -> Generator[None]:
        is_profiling = self.is_running and PROFILER in self.run and self.run[PROFILER].is_on
        range_ = record_function(EVALUATION) if is_profiling else contextlib.nullcontext()
        with range_, super().around_evaluation():
            yield

    @override
    def on_step_end(self, step: StepResult) -> None:
        super().on_step_end(step)
        if PROFILER in self.run:
            self.run[PROFILER].step()


def make_profiler(trainer: ProfilerMixin, on_trace_ready: Callable[[profile], None]) -> profile:
    """Create torch's profiler for one cycle, of the host and of the devices that torch supports."""
    waited, warmup, active = trainer.profile_wait, trainer.profile_warmup, trainer.profile_active
    return profile(
        schedule=schedule(wait=waited, warmup=warmup, active=active, repeat=1),
        on_trace_ready=on_trace_ready,
        record_shapes=trainer.profile_shapes,
        profile_memory=trainer.profile_memory,
        with_stack=trainer.profile_stacks,
    )


# ---- the report


def report(trainer: ProfilerMixin, profiler: profile, steps: int) -> Profile | None:
    """Write the trace of a cycle of `steps` steps, and print its table on rank 0."""
    num_steps = steps - trainer.profile_wait - trainer.profile_warmup
    if not num_steps and not trainer.run[PROFILER].was_interrupted:
        return None
    first = trainer.progress.steps - num_steps + 1
    result = Profile(first, num_steps, format_table(trainer, profiler), write_trace(trainer, profiler, first))
    location = "" if result.trace is None else f" Trace: {result.trace}"
    trainer.print(f"Profile of {num_steps} steps, from step {first} on.{location}\n{result.table}")
    return result


def format_table(trainer: ProfilerMixin, profiler: profile) -> str:
    """Return the table of operators, sorted by their self time on the device, or on the CPU without a device."""
    averages = profiler.key_averages(group_by_input_shape=trainer.profile_shapes)
    if trainer.profile_stacks:  # the events then include Python functions, which are not operators
        events = profiler.events() or ()  # type: ignore[no-untyped-call]  # not annotated in torch
        functions = {event.name for event in events if event.is_python_function}
        averages[:] = [average for average in averages if average.key not in functions]
    kind = "cpu" if trainer.device.type == "cpu" else "device"
    table: str = averages.table(sort_by=f"self_{kind}_time_total", row_limit=trainer.profile_rows)
    return table


def write_trace(trainer: ProfilerMixin, profiler: profile, first: int) -> Path | None:
    """Write the trace of this rank, and return its path."""
    if trainer.profile_dir is None:
        return None
    path = Path(trainer.profile_dir) / f"rank{trainer.distributed.rank}_step{first}.pt.trace.json.gz"
    try:
        profiler.export_chrome_trace(str(path))
    except (OSError, RuntimeError) as error:
        warnings.warn(f"The trace {path} could not be written, and the run continues: {error}", stacklevel=2)
        return None
    return path


# ---- the ranges of a trace


def mark_ranges(trainer: ProfilerMixin, profiler: StepProfiler) -> None:
    """Record a named range around each part of a step until the last cycle has ended."""
    ranges = dict(TRAINER_RANGES)
    for method in TRAINER_RANGES:
        is_event = get_hook_shape(getattr(TrainerCore, method, None)) == "event"
        if is_event and not overrides(trainer, TrainerCore, method):  # no class does anything in it
            del ranges[method]
    profiler.ranges.enter_context(annotate_calls(trainer, ranges))
    profiler.ranges.enter_context(annotate_calls(trainer.run.engine, ENGINE_RANGES))
    trainer.run.data = ObservedSource(trainer.run.data, functools.partial(annotate_loading, profiler, DATA))
