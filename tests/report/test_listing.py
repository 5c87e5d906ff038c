"""Runs are found by their history files, and without these by their checkpoints."""

from pathlib import Path

import pytest

from ptacc.errors import OptionError
from ptacc.report.listing import as_json, find_runs, list_runs
from ptacc.report.run_files import RecordedRun
from tests.report.runs import train
from tests.report.test_run_files import HEADER, write_lines


def names(paths: list[Path], root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in paths]


def test_later_runs_of_a_trainer_follow_the_first(tmp_path: Path) -> None:
    for number in (10, 2):
        write_lines(tmp_path / f"history-run-{number}.jsonl", HEADER)
    write_lines(tmp_path / "history.jsonl", HEADER)
    write_lines(tmp_path / "data.jsonl", {"text": "not a run"})
    assert names(find_runs(tmp_path), tmp_path) == ["history.jsonl", "history-run-2.jsonl", "history-run-10.jsonl"]


def test_later_runs_without_history_files_are_found_by_their_checkpoints(tmp_path: Path) -> None:
    train(tmp_path, max_steps=10)
    train(tmp_path / "run-2", max_steps=10)
    for history in tmp_path.rglob("history.jsonl"):
        history.unlink()
    assert names(find_runs(tmp_path), tmp_path) == [".", "run-2"]
    assert len(list_runs(tmp_path)[0]) == 2


def test_a_run_whose_history_file_is_elsewhere_is_listed_once(tmp_path: Path) -> None:
    train(tmp_path / "logs", checkpoint_dir=tmp_path / "saved", max_steps=10)
    runs, problems = list_runs(tmp_path)
    assert [run.path.name for run in runs] == ["history.jsonl"]
    assert problems == []


def test_a_file_is_a_run_by_itself(tmp_path: Path) -> None:
    assert find_runs(write_lines(tmp_path / "any name", HEADER)) == [tmp_path / "any name"]


def test_a_directory_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"has neither a history file nor checkpoints\.$"):
        find_runs(tmp_path)


def test_values_that_json_lacks_become_text() -> None:
    run = RecordedRun(Path("x"), values={"train_loss": {1: float("inf")}, "eval_loss": {1: float("nan")}})
    run.evaluated.append("eval_loss")
    assert as_json(run)["last"] == {"train_loss": "inf", "eval_loss": "nan"}
