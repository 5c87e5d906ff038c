"""Snapshots of CUDA memory. Without a GPU, torch's recorder is replaced, and the CPU counts as a device with one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from ptacc import MemorySnapshot, Pair, StepOutput, Trainer
from ptacc.callbacks import memory_snapshot
from ptacc.errors import OptionError
from ptacc.testing import tiny_data, tiny_parts


class Failing(Trainer):
    error: BaseException | None = None

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        if self.progress.steps == 2 and self.error is not None:
            raise self.error
        return super().train_step(batch)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace torch's recorder, and return its calls."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(memory_snapshot, "has_recorder", lambda _: True)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).touch())
    return calls


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def train(callback: MemorySnapshot, error: BaseException | None = None) -> None:
    options: dict[str, Any] = {"callbacks": [callback], "error": error}
    Failing(**tiny_parts(), **options).train(tiny_data(40), num_epochs=1, per_device_batch_size=8)


def test_snapshots_are_written_at_the_given_steps(tmp_path: Path, recorded: list[dict[str, Any]]) -> None:
    train(MemorySnapshot(tmp_path / "new", steps=[2, 4]))
    assert names(tmp_path / "new") == ["rank0_step2.pickle", "rank0_step4.pickle"]
    assert recorded == [{"max_entries": 100_000}, {"enabled": None}]


def test_a_snapshot_is_written_when_memory_runs_out(tmp_path: Path, recorded: list[dict[str, Any]]) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        train(MemorySnapshot(tmp_path), torch.OutOfMemoryError("CUDA out of memory."))
    assert names(tmp_path) == ["rank0_step3_out_of_memory.pickle"]
    assert recorded[-1] == {"enabled": None}


def test_other_exceptions_write_no_snapshot(tmp_path: Path, recorded: list[dict[str, Any]]) -> None:
    with pytest.raises(KeyError):
        train(MemorySnapshot(tmp_path), KeyError("on purpose"))
    assert names(tmp_path) == []


def test_a_snapshot_that_cannot_be_written_is_a_warning(
    tmp_path: Path, recorded: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str) -> None:
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", fail)
    with pytest.warns(UserWarning, match="rank0_step1.pickle could not be written: .*No space left"):
        train(MemorySnapshot(tmp_path, steps=[1]))


def test_on_the_cpu_a_warning_says_that_it_needs_cuda(tmp_path: Path) -> None:
    trainer = Trainer(**tiny_parts(), callbacks=[MemorySnapshot(tmp_path, steps=[1])])
    with pytest.warns(UserWarning, match="MemorySnapshot needs a CUDA device, and the run is on cpu"):
        trainer.train(tiny_data(), num_epochs=1)
    assert names(tmp_path) == []


@pytest.mark.parametrize("options", [{"directory": "s3://bucket"}, {"steps": [0]}, {"max_entries": 0}])
def test_invalid_options_are_errors(options: dict[str, Any]) -> None:
    options = {"directory": "snapshots", **options}
    with pytest.raises(OptionError, match="MemorySnapshot"):
        MemorySnapshot(**options)
