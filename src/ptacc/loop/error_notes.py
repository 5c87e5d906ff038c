"""Notes on exceptions: the step, the evaluation or the prediction in which they were raised, and its batch.

`error.add_note` adds them, and Python prints them below the message. They are strings, so they keep no tensor alive,
and they are made when an exception is raised, so a step without one costs nothing.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from ptacc.core.hooks import TrainerCore
from ptacc.data.batch import HostBatch
from ptacc.data.wrappers import Batches
from ptacc.errors import RankFailedError
from ptacc.loop.hints import find_hint
from ptacc.model.state_dict import describe_tensor
from ptacc.profiling.memory import describe_memory, is_on, is_out_of_memory
from ptacc.run.run import Run
from ptacc.run.window import Window
from ptacc.tensors.structures import iterate_leaves
from ptacc.validation import list_some

MARK = "ptacc: raised "
MOST_PARTS, MOST_INDICES = 8, 8
"""Parts of a batch and indices of samples that a note lists."""
HINT_WIDTH = 100


def note_step(trainer: TrainerCore, error: Exception, run: Run, window: Window[Any]) -> None:
    """Add a note to an exception of a step over the batches of a window."""
    is_counted = run.progress.offset == window.end
    step, number = run.progress.steps + (not is_counted), len(window.batches)
    place = f"in step {step} of training (epoch {run.progress.epochs + 1})"
    if run.batch is None:
        add_note(trainer, error, f"{place}, outside of its forward and backward passes", window.batches[-1])
        return
    index = next((i for i, host in enumerate(window.batches, start=1) if host.end == run.batch.end), 0)
    add_note(trainer, error, f"{place}, batch {index} of {number}", run.batch)


@contextlib.contextmanager
def noting_loading(trainer: TrainerCore, run: Run) -> Generator[None]:
    """Add a note to an exception of the block, which loads the batches of training."""
    try:
        yield
    except Exception as error:
        step, epoch = run.progress.steps + 1, run.progress.epochs + 1
        add_note(trainer, error, f"while the batches of step {step} of training (epoch {epoch}) were loaded")
        raise


@contextlib.contextmanager
def noting_batches(trainer: TrainerCore, what: str) -> Generator[Callable[[Batches], Batches]]:
    """Add a note to an exception of the block, such as `"an evaluation"` or `"a prediction"`.

    Yield a function that passes batches on, and records which of them is being loaded or computed.
    """
    batch: HostBatch[Any] | None = None
    number, is_over = 0, False

    def follow(batches: Batches) -> Batches:
        nonlocal batch, number, is_over
        for batch in batches:
            number += 1
            yield batch
            batch = None
        is_over = True

    try:
        yield follow
    except Exception as error:
        when = f" after step {trainer.progress.steps}" if trainer.is_running else ""
        where = f"while batch {number + 1} was loaded"
        if batch is not None:
            where = f"batch {number}"
        elif is_over:
            where = f"after its {number} batches"
        add_note(trainer, error, f"in {what}{when}, {where}", batch)
        raise


def add_note(trainer: TrainerCore, error: Exception, place: str, batch: HostBatch[Any] | None = None) -> None:
    """Add a note to an exception, unless it has one of this module or is the failure of another rank."""
    has_note = any(note.startswith(MARK) for note in getattr(error, "__notes__", ()))
    if has_note or isinstance(error, RankFailedError):
        return
    lines: list[str] = []
    with contextlib.suppress(Exception):  # the error matters more than its note, which then lacks lines
        for line in describe(trainer, error, place, batch):
            lines.append(line)  # noqa: PERF402  # `extend` would lose them
    error.add_note("\n".join(lines))


def describe(trainer: TrainerCore, error: Exception, place: str, batch: HostBatch[Any] | None) -> Iterator[str]:
    """Yield the lines of a note: the place, the batch, what memory holds if that ran out, and a hint."""
    ranks, device = trainer.distributed, trainer.device
    yield f"{MARK}{place}, on rank {ranks.rank} of {ranks.world_size}"
    if batch is not None:
        yield from describe_batch(batch, device)
    if is_out_of_memory(error):
        yield from describe_memory(device, trainer.trained_modules, [s.optimizer for s in trainer.optimizer_slots()])
    if hint := find_hint(str(error)):
        yield from textwrap.wrap(f"hint: {hint}", HINT_WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def describe_batch(batch: HostBatch[Any], device: torch.device) -> Iterator[str]:
    """Yield lines with the dtypes, shapes and devices of a batch, and the indices of its samples."""
    leaves = list(iterate_leaves(batch.data, "batch"))
    for path, leaf in leaves[:MOST_PARTS]:
        yield f"  {path}: {describe_leaf(leaf, device)}"
    if len(leaves) > MOST_PARTS:
        yield f"  and {len(leaves) - MOST_PARTS} more values"
    if batch.is_padding:
        yield "  a padding batch, which repeats samples and does not count"
    if batch.indices is not None:
        yield f"  indices of its samples: {list_some([str(int(i)) for i in batch.indices], MOST_INDICES)}"


def describe_leaf(leaf: object, device: torch.device) -> str:
    """Describe a value of a batch, which is moved to `device` before it is used.

    Example:
        >>> describe_leaf(torch.zeros(8, 3), torch.device("cpu")), describe_leaf("a label", torch.device("cpu"))
        ('float32 (8, 3) on cpu', 'str')
    """
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    moved = "" if is_on(leaf, device) else f", moved to {device}"
    return f"{describe_tensor(leaf)} on {leaf.device}{moved}"
