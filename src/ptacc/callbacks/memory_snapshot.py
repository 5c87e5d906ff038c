"""Write torch's snapshots of CUDA memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection

import torch
from typing_extensions import override

from ptacc.core.callback import Callback
from ptacc.core.hooks import TrainerCore
from ptacc.profiling.memory import is_out_of_memory
from ptacc.run.step_result import StepResult
from ptacc.validation import absolute_path, check_at_least


class MemorySnapshot(Callback[TrainerCore]):
    """Records allocations of CUDA memory, with their call stacks, and writes them to view at pytorch.org/memory_viz.

    When memory runs out in a run, each rank that runs out writes `rank0_step12_out_of_memory.pickle`, with the step in
    which it did. After each of `steps`, every rank writes `rank0_step100.pickle`. A later run overwrites the files of
    the same steps.

    Recording takes some microseconds for each allocation. On other devices than CUDA nothing is recorded.

    Args:
        directory: A local directory for the snapshots. It is created if it does not exist.
        steps: Numbers of the steps after which snapshots are written.
        max_entries: Largest number of allocations and releases that are kept, at least 1: the last ones.

    Raises:
        OptionError: The directory is a URL, or a number is below 1.

    Warns:
        UserWarning: The run is not on a CUDA device, or a snapshot cannot be written. The run continues.

    Source: https://docs.pytorch.org/docs/stable/torch_cuda_memory.html
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, steps: Collection[int] = (), max_entries: int = 100_000
    ) -> None:
        owner = "MemorySnapshot"
        self._directory = absolute_path(owner, "directory", directory, "torch writes snapshots to local files only.")
        for step in steps:
            check_at_least(owner, "steps", step, 1)
        check_at_least(owner, "max_entries", max_entries, 1)
        self._steps, self._max_entries = frozenset(steps), max_entries
        self._is_recording = False

    @override
    def on_run_start(self, trainer: TrainerCore) -> None:
        if not has_recorder(trainer.device):
            warnings.warn(
                f"MemorySnapshot needs a CUDA device, and the run is on {trainer.device}: no snapshot will be written.",
                stacklevel=2,
            )
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._record_memory_history(max_entries=self._max_entries)  # noqa: SLF001  # documented by torch
        self._is_recording = True

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        if step.step in self._steps:
            self._write(trainer, f"step{step.step}")

    @override
    def on_exception(self, trainer: TrainerCore, error: BaseException) -> None:
        if is_out_of_memory(error):
            self._write(trainer, f"step{trainer.progress.steps + 1}_out_of_memory")
        self._stop()

    @override
    def on_run_end(self, trainer: TrainerCore) -> None:
        self._stop()

    def _write(self, trainer: TrainerCore, name: str) -> None:
        path = self._directory / f"rank{trainer.distributed.rank}_{name}.pickle"
        if not self._is_recording:
            return
        try:
            torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]  # noqa: SLF001
        except (OSError, RuntimeError) as error:
            warnings.warn(f"The memory snapshot {path} could not be written: {error}", stacklevel=2)

    def _stop(self) -> None:
        if self._is_recording:
            torch.cuda.memory._record_memory_history(enabled=None)  # noqa: SLF001
        self._is_recording = False


def has_recorder(device: torch.device) -> bool:
    """Return whether torch records the allocations of a device."""
    return device.type == "cuda"
