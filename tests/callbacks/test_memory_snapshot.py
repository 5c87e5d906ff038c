"""Snapshots of CUDA memory. Without a GPU, torch's recorder is replaced, and a stand-in trainer is on CUDA."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ptacc import MemorySnapshot, StepResult, Trainer
from ptacc.errors import OptionError
from ptacc.testing import tiny_data, tiny_parts

ON_CUDA: Any = SimpleNamespace(
    device=torch.device("cuda"), distributed=SimpleNamespace(rank=1), progress=SimpleNamespace(steps=6)
)
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory.")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace torch's recorder, and return its calls."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).touch())
    return calls


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_snapshots_are_written_at_the_given_steps(tmp_path: Path, recorded: list[dict[str, Any]]) -> None:
    callback = MemorySnapshot(tmp_path / "new", steps=[2, 4])
    callback.on_run_start(ON_CUDA)
    for step in range(1, 6):
        callback.on_step_end(ON_CUDA, StepResult(step, 1, 8, 0.1))
    callback.on_run_end(ON_CUDA)
    assert names(tmp_path / "new") == ["rank1_step2.pickle", "rank1_step4.pickle"]
    assert recorded == [{"max_entries": 100_000}, {"enabled": None}]


def test_a_snapshot_is_written_when_memory_runs_out(tmp_path: Path, recorded: list[dict[str, Any]]) -> None:
    callback = MemorySnapshot(tmp_path)
    callback.on_run_start(ON_CUDA)
    callback.on_exception(ON_CUDA, OUT_OF_MEMORY)
    assert names(tmp_path) == ["rank1_step7_out_of_memory.pickle"]
    assert recorded[-1] == {"enabled": None}


def test_other_exceptions_write_no_snapshot(tmp_path: Path, recorded: list[dict[str, Any]]) -> None:
    callback = MemorySnapshot(tmp_path)
    callback.on_run_start(ON_CUDA)
    callback.on_exception(ON_CUDA, KeyError("on purpose"))
    assert names(tmp_path) == []


def test_a_snapshot_that_cannot_be_written_is_a_warning(tmp_path: Path, recorded: list[dict[str, Any]]) -> None:
    callback = MemorySnapshot(tmp_path / "gone", steps=[1])
    callback.on_run_start(ON_CUDA)
    (tmp_path / "gone").rmdir()
    with pytest.warns(UserWarning, match="rank1_step1.pickle could not be written"):
        callback.on_step_end(ON_CUDA, StepResult(1, 1, 8, 0.1))


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
