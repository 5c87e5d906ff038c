"""Profiling a few steps with torch's profiler."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.profiler import profile, record_function, schedule
from typing_extensions import override

from ptacc.core.callback import overrides
from ptacc.core.hooks import Mixin, TrainerCore
from ptacc.data.wrappers import ObservedSource
from ptacc.errors import OptionError
from ptacc.profiling.trace import Profile, StepProfiler, marked_calls, marked_loading
from ptacc.run.history import StepResult
from ptacc.run.state import StateKey
from ptacc.validation import check_at_least

DATA, EVALUATION = "ptacc/data", "ptacc/evaluation"
OF_THE_TRAINER = {
    "train_step": "ptacc/forward",
    "backward": "ptacc/backward",
    "on_gradients_ready": "ptacc/gradients_ready",
    "save_run_state": "ptacc/checkpoint",
}
OF_THE_ENGINE = {"update": "ptacc/optimizer"}
"""Methods that the loop calls, each with the range that stands for its calls in a trace."""

PROFILER: StateKey[StepProfiler] = StateKey("profiler")


class ProfilerMixin(Mixin):
    """Profiles a few steps early in a run: a trace file of each process, and a table of the operators that cost most.

    The first steps are no measure: kernels are chosen and compiled, memory is reserved. So some are let pass, some warm
    the profiler itself up, and then a few are recorded. What is counted are the steps of this `train()`, also where it
    goes on with a saved run. A profiled step reaches from the end of the step before to its own: whatever lies in
    between, then waiting for its data, forward, backward, update.

    In a trace, ranges tell these apart: `ptacc/data`, `ptacc/forward`, `ptacc/backward`, `ptacc/gradients_ready`
    (hooks, such as clipping), `ptacc/optimizer`, and between steps `ptacc/evaluation` and `ptacc/checkpoint`.

    Rank 0 prints the table; `trainer.profiles` has it too. An exception ends the recording, and what there is of it is
    written. No number changes by a bit, and once the last cycle is over nothing is left but a look at a flag each step.

    Options:
        profile_dir: Where trace files go, as `rank0_step8.pt.trace.json.gz`, which https://ui.perfetto.dev and
            TensorBoard read; None writes none. A later run replaces the files of the same steps.
        profile_wait: Steps that are let pass first, at least 0.
        profile_warmup: Steps with the profiler on, whose events are thrown away, at least 1.
        profile_active: Steps that are recorded, at least 1.
        profile_repeat: Cycles of waiting, warming up and recording, at least 1.
        profile_memory: Whether to record what is allocated.
        profile_shapes: Whether to record the shapes that operators get, and have the table tell them apart.
        profile_stacks: Whether to record the Python functions around the operators; the trace has them, the table not.
        profile_rows: Rows of the table, at least 1.

    Hooks: `around_run`, `around_evaluation`, `on_step_end`.

    Combines with: everything. Of other mixins' work after a step, only that of those behind this one is in the step.

    Example:
        >>> from ptacc import ProfilerMixin, Trainer
        >>> class MyTrainer(ProfilerMixin, Trainer):
        ...     profile_wait = 20
    """

    profile_dir: str | Path | None = None
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
        """Refuse counts that are too small, and a remote store for the traces."""
        owner = type(self).__name__
        check_at_least(owner, "profile_wait", self.profile_wait, 0)
        for name in ("profile_warmup", "profile_active", "profile_repeat", "profile_rows"):
            check_at_least(owner, name, getattr(self, name), 1)
        if "://" in str(self.profile_dir):
            raise OptionError(
                f"{owner}(profile_dir={str(self.profile_dir)!r}): torch writes traces to local files alone. Give a "
                "local path, and copy them from there."
            )

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """What was found in the present run, or the last one, on this process: one profile for each cycle."""
        return tuple(self.run[PROFILER].profiles)

    @override
    @contextlib.contextmanager
    def around_run(self) -> Iterator[None]:
        """Start the profiler, and stop it wherever it is."""
        if self.is_isolated:
            with super().around_run():
                yield
            return
        if self.profile_dir is not None:
            Path(self.profile_dir).mkdir(parents=True, exist_ok=True)  # before the first step: it may be refused
        make = functools.partial(make_profiler, self)
        profiler = StepProfiler(make, functools.partial(report, self), self.profile_repeat)
        self.run[PROFILER] = profiler
        with super().around_run(), profiler.marks:
            mark_ranges(self, profiler)
            profiler.start()
            try:
                yield
            except BaseException:
                profiler.is_broken_off = True
                raise
            finally:
                profiler.stop()
        if not profiler.profiles:
            waited, warmup = self.profile_wait, self.profile_warmup
            self.print(f"No step was profiled: the run ended within {waited} steps of waiting and {warmup} of warm-up.")

    @override
    @contextlib.contextmanager
    def around_evaluation(self) -> Iterator[None]:
        """Mark the evaluation."""
        with (
            record_function(EVALUATION) if profiles_now(self) else contextlib.nullcontext(),
            super().around_evaluation(),
        ):
            yield

    @override
    def on_step_end(self, step: StepResult) -> None:
        """Move the profiler on."""
        super().on_step_end(step)
        if PROFILER in self.run:
            self.run[PROFILER].step()


def profiles_now(trainer: ProfilerMixin) -> bool:
    """Say whether a run is under way that has more to profile."""
    return trainer.is_running and PROFILER in trainer.run and trainer.run[PROFILER].is_on


def make_profiler(trainer: ProfilerMixin, take: Callable[[profile], None]) -> profile:
    """Make torch's profiler for one cycle: of the host, and of whatever device torch was built for."""
    waited, warmup, active = trainer.profile_wait, trainer.profile_warmup, trainer.profile_active
    return profile(
        schedule=schedule(wait=waited, warmup=warmup, active=active, repeat=1),
        on_trace_ready=take,
        record_shapes=trainer.profile_shapes,
        profile_memory=trainer.profile_memory,
        with_stack=trainer.profile_stacks,
    )


# ---- what was found


def report(trainer: ProfilerMixin, profiler: profile, steps: int) -> Profile | None:
    """Write the trace of a cycle that saw so many steps, and print its table on rank 0."""
    num_steps = steps - trainer.profile_wait - trainer.profile_warmup
    if not num_steps and not trainer.run[PROFILER].is_broken_off:
        return None
    first = trainer.progress.steps - num_steps + 1
    found = Profile(first, num_steps, format_table(trainer, profiler), write_trace(trainer, profiler, first))
    where = "" if found.trace is None else f" Trace: {found.trace}"
    trainer.print(f"Profile of {num_steps} steps, from step {first} on.{where}\n{found.table}")
    return found


def format_table(trainer: ProfilerMixin, profiler: profile) -> str:
    """Return the table of the operators, by the time that they took themselves on the device where there is one."""
    averages = profiler.key_averages(group_by_input_shape=trainer.profile_shapes)
    if trainer.profile_stacks:  # then Python's functions are among the events, and they are no operators
        events = profiler.events() or ()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        functions = {event.name for event in events if event.is_python_function}
        averages[:] = [average for average in averages if average.key not in functions]
    kind = "cpu" if trainer.device.type == "cpu" else "device"
    table: str = averages.table(sort_by=f"self_{kind}_time_total", row_limit=trainer.profile_rows)
    return table


def write_trace(trainer: ProfilerMixin, profiler: profile, first: int) -> Path | None:
    """Write the trace of this process, and return where it is."""
    if trainer.profile_dir is None:
        return None
    path = Path(trainer.profile_dir) / f"rank{trainer.distributed.rank}_step{first}.pt.trace.json.gz"
    try:
        profiler.export_chrome_trace(str(path))
    except (OSError, RuntimeError) as error:
        warnings.warn(f"The trace {path} could not be written, and the run goes on: {error}", stacklevel=2)
        return None
    return path


# ---- the ranges of a trace


def mark_ranges(trainer: ProfilerMixin, profiler: StepProfiler) -> None:
    """Mark the parts of steps until there is no more to see."""
    written = {method: name for method, name in OF_THE_TRAINER.items() if not is_empty(trainer, method)}
    profiler.marks.enter_context(marked_calls(trainer, written))
    profiler.marks.enter_context(marked_calls(trainer.run.engine, OF_THE_ENGINE))
    trainer.run.data = ObservedSource(trainer.run.data, functools.partial(marked_loading, profiler, DATA))


def is_empty(trainer: TrainerCore, method: str) -> bool:
    """Say whether a method is a hook in which nobody does anything."""
    return hasattr(TrainerCore, method) and not overrides(trainer, TrainerCore, method)
