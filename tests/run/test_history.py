import contextlib
import json
import math
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from typing_extensions import override

from ptacc import (
    Callback,
    CheckpointMixin,
    DeepSpeedMixin,
    GradAccumMixin,
    ProfilerMixin,
    StepOutput,
    Trainer,
    TrainerCore,
)
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import OptionError
from ptacc.run.history import STEPS_IN_MEMORY, RunHistory
from ptacc.run.history_file import HistoryFile
from ptacc.run.step_result import StepResult
from ptacc.testing import tiny_data, tiny_parts
from ptacc.testing.laws import same
from tests.checkpoint.faults.powerless import Logged
from tests.checkpoint.test_parts import through_files
from tests.devices import MPSTensor
from tests.records import read_all, read_lines


class Logging(Trainer):
    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        output = super().train_step(batch)
        return StepOutput(
            output.loss, output.outputs, logged={"first": batch[0][0, 0], "size": torch.tensor(len(batch[0]))}
        )


def test_losses_on_mps_are_read_without_float64() -> None:
    history = RunHistory()
    for number in (1, 2):
        loss = torch.tensor(number / 2).as_subclass(MPSTensor)
        history.add_step(StepResult(number, 1, 4.0, 0.1, loss), DistributedRuntime())
    history.read_steps(DistributedRuntime())
    assert [step.loss for step in history.steps] == [0.5, 1.0]


def test_steps_and_epochs_agree() -> None:
    history = Trainer(**tiny_parts()).train(tiny_data(20), num_epochs=2)
    for number, epoch in enumerate(history, start=1):
        steps = [step for step in history.steps if step.epoch == number]
        assert epoch.items == sum(step.items for step in steps) == 20
        assert epoch.train_loss == pytest.approx(sum(step.loss * step.items for step in steps) / 20, rel=1e-12)


def test_what_steps_log_is_a_mean_over_items() -> None:
    history = Logging(**tiny_parts()).train(tiny_data(20), num_epochs=1)
    assert [step.logged["size"] for step in history.steps] == [8, 8, 4]
    assert history[0].values()["train/size"] == pytest.approx((8 + 8 + 4) / 3)


def test_losses_and_values_in_bfloat16_are_summed_in_float32() -> None:
    one = torch.ones((), dtype=torch.bfloat16)

    class Narrow(GradAccumMixin, Trainer):
        @override
        def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
            self.log({"late": one})
            loss = super().train_step(batch).loss
            return StepOutput((0.0 * loss + 1.328125).bfloat16(), batch[0], logged={"one": one})

    trainer = Narrow(**tiny_parts(), gradient_accumulation_steps=512)
    record = trainer.train(tiny_data(512), num_epochs=1, per_device_batch_size=1)[0]
    assert (record.train_loss, record.values()["train/one"], record.values()["late"]) == (1.328125, 1.0, 1.0)


def test_a_step_reports_only_what_it_logs() -> None:
    class Sometimes(Trainer):
        @override
        def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
            output = super().train_step(batch)
            return StepOutput(
                output.loss, output.outputs, logged={"odd": torch.tensor(2.0)} if self.progress.steps % 2 else {}
            )

    history = Sometimes(**tiny_parts()).train(tiny_data(20), num_epochs=1)
    assert [step.logged for step in history.steps] == [{}, {"odd": 2.0}, {}]
    assert history[0].values()["train/odd"] == 2.0


def test_memory_is_bounded_and_the_file_has_all_steps(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "history.jsonl"
    trainer = Trainer(**tiny_parts(), history_file=file)
    history = trainer.train(tiny_data(8), max_steps=STEPS_IN_MEMORY + 50, per_device_batch_size=8)
    assert len(history.steps) == STEPS_IN_MEMORY
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, STEPS_IN_MEMORY + 51))
    assert lines[0]["kind"] == "run"
    assert sum(line["kind"] == "epoch" for line in lines) == len(history) == STEPS_IN_MEMORY + 50


def test_what_a_state_counts_is_durable_with_all_new_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "and deeper" / "history.jsonl"
    disk, file = Logged(tmp_path, path), HistoryFile(path)
    monkeypatch.setattr(os, "fsync", disk.fsync)
    for number in range(2):
        file.append([("step", {"step": number})])
    assert file.state_dict()["length"] == len(disk.durable) == path.stat().st_size
    assert all(disk.names.values())


def test_long_epochs_are_read_before_they_end() -> None:
    trainer = Logging(**tiny_parts())
    data = tiny_data(24)
    long: torch.utils.data.ConcatDataset[tuple[Tensor, ...]] = torch.utils.data.ConcatDataset([data] * 50)
    history = trainer.train(long, num_epochs=1, per_device_batch_size=1)
    assert len(history.steps) == STEPS_IN_MEMORY
    assert history.steps[-1].step == 1200
    assert history[0].train_metrics["size"] == 1.0


def test_a_history_is_exported_as_a_mapping_lines_and_a_frame(tmp_path: Path) -> None:
    history = Trainer(**tiny_parts()).train(tiny_data(24), tiny_data(8), num_epochs=2)
    columns = history.to_dict()
    assert columns["epoch"] == [1.0, 2.0]
    assert columns["eval_loss"] == [epoch.eval_loss for epoch in history]
    frame = history.to_dataframe()
    assert list(frame.columns) == list(columns)
    history.write_jsonl(tmp_path / "history.jsonl")
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert kinds == ["step"] * 6 + ["values"] * 2 + ["evaluation"] * 2 + ["epoch"] * 2


def test_a_history_is_a_sequence_of_epochs() -> None:
    history = Trainer(**tiny_parts()).train(tiny_data(), num_epochs=3)
    assert [epoch.epoch for epoch in history] == [1, 2, 3]
    assert [epoch.epoch for epoch in history[1:]] == [2, 3]
    assert repr(history) == "RunHistory(3 epochs, 9 steps in memory)"


def test_a_history_is_restored_from_a_file(tmp_path: Path) -> None:
    trainer = Logging(**tiny_parts())
    history = trainer.train(tiny_data(24), {"few": tiny_data(3), "": tiny_data(8)}, num_epochs=2, evaluate_first=True)
    restored = RunHistory()
    restored.load_state_dict(through_files(tmp_path, {"history": history.state_dict()})["history"])
    assert list(restored) == list(history)
    assert (restored.steps, restored.initial) == (history.steps, history.initial)
    assert same(restored.state_dict(), history.state_dict())


def test_a_file_belongs_to_one_run(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    Trainer(**tiny_parts(), history_file=file).train(tiny_data(), num_epochs=1)
    before, other = file.read_text(), Trainer(**tiny_parts(), history_file=file)
    weight = next(other.model.parameters()).clone()
    with pytest.raises(OptionError, match=r"history.jsonl' belongs to another run: .*Give this run a file of its own"):
        other.train(tiny_data(), num_epochs=1)
    assert file.read_text() == before
    assert torch.equal(next(other.model.parameters()), weight)


def test_of_two_runs_that_start_with_one_file_the_second_to_write_is_refused(tmp_path: Path) -> None:
    first, second = HistoryFile(tmp_path / "history.jsonl"), HistoryFile(tmp_path / "history.jsonl")
    first.append([("run", {})])
    with pytest.raises(OptionError, match="belongs to another run"):
        second.append([("run", {})])


def test_a_file_that_is_no_history_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("to do")
    with pytest.raises(OptionError, match="belongs to another run: it has 5 bytes"):
        Trainer(**tiny_parts(), history_file=tmp_path / "notes.txt").train(tiny_data(), num_epochs=1)


def test_later_runs_of_a_trainer_have_files_of_their_own(tmp_path: Path) -> None:
    trainer = Trainer(**tiny_parts(), history_file=tmp_path / "history.jsonl")
    for _ in range(2):
        trainer.train(tiny_data(), num_epochs=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history-run-2.jsonl", "history.jsonl"]


class Interrupted(Trainer):
    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        raise KeyboardInterrupt


@pytest.mark.parametrize("left", [None, b'{"kind": "r', b'{"kin\0\0\0', b""])
def test_a_run_that_left_no_checkpoint_starts_its_file_over(tmp_path: Path, left: bytes | None) -> None:
    class Saving(CheckpointMixin, Trainer): ...

    class Killed(CheckpointMixin, Interrupted): ...

    file = tmp_path / "history.jsonl"
    options: dict[str, Any] = {"checkpoint_dir": tmp_path / "run", "history_file": file, "resume": True}
    with pytest.raises(KeyboardInterrupt):
        Killed(**tiny_parts(), **options, checkpoint_on_exception=False).train(tiny_data(), num_epochs=1)
    if left is not None:
        file.write_bytes(left)  # what a loss of power left of the first line
    Saving(**tiny_parts(), **options).train(tiny_data(), num_epochs=1)
    assert [line["kind"] for line in read_lines(file)] == ["run", *["step"] * 3, "epoch", "values"]
    options["checkpoint_dir"] = tmp_path / "other"
    other = Saving(**tiny_parts(), **options)
    with pytest.raises(OptionError, match="belongs to another run"):
        other.train(tiny_data(), num_epochs=1)


class StopsAt(Callback[TrainerCore]):
    """Ends the run by an exception after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        if step.step == self.step:
            raise ValueError("enough\nfor now")


def attempt(folder: Path, stops_at: int = 0, num_epochs: int = 3) -> list[dict[str, Any]]:
    """Start a run or resume it, perhaps until an exception. Return the lines of its file about attempts."""

    class Saving(CheckpointMixin, Trainer): ...

    options: dict[str, Any] = {"checkpoint_dir": folder, "history_file": folder / "history.jsonl", "resume": True}
    trainer = Saving(**tiny_parts(), **options, callbacks=[StopsAt(stops_at)], checkpoint_on_exception=False)
    with pytest.raises(ValueError, match="enough") if stops_at else contextlib.nullcontext():
        trainer.train(tiny_data(24), num_epochs=num_epochs)
    return [line for line in read_all(folder / "history.jsonl") if line["kind"] in ("run", "resumed", "end")]


def test_each_resumption_stays_in_the_file_although_others_resume_from_the_same_checkpoint(tmp_path: Path) -> None:
    attempt(tmp_path, stops_at=4)
    attempt(tmp_path, stops_at=5)
    lines = attempt(tmp_path)
    assert [line["kind"] for line in lines] == ["run", *["end", "resumed"] * 2, "end"]
    assert [line["step"] for line in lines[1:]] == [4, 3, 5, 3, 9]
    assert [line["error"] for line in lines if line["kind"] == "end"] == ["ValueError: enough"] * 2 + [None]


def test_a_complete_run_that_is_started_again_writes_nothing(tmp_path: Path) -> None:
    attempt(tmp_path)
    before = (tmp_path / "history.jsonl").read_bytes()
    attempt(tmp_path)
    assert (tmp_path / "history.jsonl").read_bytes() == before


def test_the_lines_of_a_start_and_of_a_resumption_describe_the_trainer(tmp_path: Path) -> None:
    attempt(tmp_path, num_epochs=1)
    run, _, resumed, end = attempt(tmp_path, num_epochs=2)
    assert (run["arguments"]["num_epochs"], resumed["arguments"]["num_epochs"]) == ("1", "2")
    assert run["options"]["keep_last"] == ["None", "default of CheckpointMixin"]
    assert run["environment"]["torch"] == torch.__version__
    assert datetime.fromisoformat(run["time"]) <= datetime.fromisoformat(end["time"])


def test_the_file_says_why_a_run_was_stopped(tmp_path: Path) -> None:
    Trainer(**tiny_parts(), history_file=tmp_path / "history.jsonl").train(tiny_data(), max_time=1e-9)
    assert read_all(tmp_path / "history.jsonl")[-1]["reason"] == "max_time=1e-09 reached"


def test_the_file_says_that_a_run_was_interrupted(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Interrupted(**tiny_parts(), history_file=tmp_path / "history.jsonl").train(tiny_data(), num_epochs=1)
    assert read_all(tmp_path / "history.jsonl")[-1]["error"] == "KeyboardInterrupt"


def test_paths_do_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class All(CheckpointMixin, ProfilerMixin, DeepSpeedMixin, Trainer): ...

    names = ("checkpoint_dir", "resume", "profile_dir", "history_file", "deepspeed_config")
    (tmp_path / "deepspeed_config").write_text("{}")
    monkeypatch.chdir(tmp_path)
    paths: dict[str, Any] = {name: name for name in names}
    trainer = All(**tiny_parts(), **paths)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert {name: str(getattr(trainer, name)) for name in names} == {name: str(tmp_path / name) for name in names}


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path_is_refused(path: str) -> None:
    with pytest.raises(OptionError, match=r"history_file='.*must be a local path"):
        Trainer(**tiny_parts(), history_file=path)


def test_a_file_on_a_remote_store_raises() -> None:
    with pytest.raises(OptionError, match=r"history_file='s3://bucket/history.jsonl'\): must be a local path"):
        Trainer(**tiny_parts(), history_file="s3://bucket/history.jsonl")


def read_strictly(file: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in file.read_text().splitlines()]


def test_losses_that_are_not_finite_are_written_as_json_and_read_back(tmp_path: Path) -> None:
    class Diverging(Trainer):
        @override
        def compute_eval_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return torch.tensor(math.inf, dtype=outputs.dtype)

        @override
        def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return super().compute_train_loss(outputs, targets) * math.nan

    file = tmp_path / "history.jsonl"
    parts: dict[str, Any] = {**tiny_parts(), "default_callbacks": (), "history_file": file}
    history = Diverging(**parts).train(tiny_data(8), tiny_data(8), num_epochs=1)
    (epoch,) = (line for line in read_strictly(file) if line["kind"] == "epoch")
    assert epoch["train_loss"] is None
    assert epoch["evaluations"][""]["loss"] == math.inf
    history.write_jsonl(tmp_path / "again.jsonl")
    assert read_strictly(tmp_path / "again.jsonl")[-1] == epoch
    assert pd.read_json(file, lines=True).train_loss.dtype == float
