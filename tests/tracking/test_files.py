import csv
import json
from pathlib import Path

import pytest

from ptacc.errors import OptionError
from ptacc.protocols import TrackedRun
from ptacc.tracking import CSVTracker, FileTracker, JSONLinesTracker

every_file_tracker = pytest.mark.parametrize("kind", [JSONLinesTracker, CSVTracker])


@every_file_tracker
def test_a_new_run_never_overwrites_a_file(kind: type[FileTracker], tmp_path: Path) -> None:
    for _ in range(3):
        tracker = kind(tmp_path / "values.txt")
        tracker.start({"lr": 0.1}, None)
        tracker.log({"loss": 1.0}, 5)
        tracker.finish(0)
    assert {path.name for path in tmp_path.glob("*.txt")} == {"values.txt", "values-run-2.txt", "values-run-3.txt"}
    assert json.loads((tmp_path / "values-run-2.config.json").read_text()) == {"lr": 0.1}


@every_file_tracker
def test_a_continued_run_keeps_the_reports_before_its_checkpoint(kind: type[FileTracker], tmp_path: Path) -> None:
    tracker = kind(tmp_path / "values.txt")
    run_id = tracker.start({}, None)
    tracker.log({"loss": 1.0}, 5)
    before = (tmp_path / "values.txt").read_bytes()
    tracker.log({"loss": 2.0}, 10)
    tracker.finish(0)
    with (tmp_path / "values.txt").open("a") as file:
        file.write('{"step": 15, "lo')  # the process was killed within a write
    assert kind(tmp_path / "values.txt").start({}, TrackedRun(run_id, reports=1, step=5)) == run_id
    assert (tmp_path / "values.txt").read_bytes() == before


def test_a_value_with_a_new_name_gets_a_column(tmp_path: Path) -> None:
    tracker = CSVTracker(tmp_path / "values.csv")
    tracker.start({}, None)
    tracker.log({"loss": 0.1}, 5)
    tracker.log({"loss": float("nan"), "accuracy": 0.5}, 10)
    tracker.log({"loss": 0.3}, 15)
    rows = list(csv.reader((tmp_path / "values.csv").read_text().splitlines()))
    assert rows == [["step", "loss", "accuracy"], ["5", "0.1", ""], ["10", "nan", "0.5"], ["15", "0.3", ""]]


def test_a_line_of_json_has_the_step_and_the_values(tmp_path: Path) -> None:
    tracker = JSONLinesTracker(tmp_path / "values.jsonl")
    tracker.start({}, None)
    tracker.log({"loss": float("nan"), "accuracy": 0.5}, 10)
    tracker.finish(0)
    assert (tmp_path / "values.jsonl").read_text() == '{"step": 10, "loss": null, "accuracy": 0.5}\n'


def test_the_path_must_be_local() -> None:
    with pytest.raises(OptionError, match=r"JSONLinesTracker\(path='s3://bucket/x'\): must be a local path"):
        JSONLinesTracker("s3://bucket/x")
