"""A run is read from its history file and its checkpoints."""

import json
import math
import os
from pathlib import Path

import pytest

from ptacc.errors import OptionError
from ptacc.report.run_files import read_run
from tests.ranks import FORK
from tests.records import read_all
from tests.report.runs import train


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


HEADER = {"kind": "run", "seed": 1, "checkpoints": None}


def test_each_evaluation_of_a_run_is_read_once_although_it_was_killed_twice(tmp_path: Path) -> None:
    train(tmp_path, fails_at=27)
    train(tmp_path, fails_at=44)
    run = train(tmp_path)
    assert [*run.values["eval_loss"]] == [10, 20, 30, 40, 50]
    assert [*run.values["train_loss"]] == [*range(5, 55, 5)]
    assert [*run.step_losses] == [*range(1, 51)]
    assert [attempt.first_step for attempt in run.attempts] == [0, 15, 30]
    assert (run.evaluated, run.step, run.planned, run.status) == (["eval_loss"], 50, 50, "complete")


def test_an_interrupted_run_has_the_values_of_an_uninterrupted_one(tmp_path: Path) -> None:
    train(tmp_path / "interrupted", fails_at=27)
    runs = [train(tmp_path / name) for name in ("interrupted", "whole")]
    first, second = ({name: run.values[name] for name in ("train_loss", "eval_loss")} for run in runs)
    assert first == second


def test_the_status_says_how_a_run_ended(tmp_path: Path) -> None:
    assert train(tmp_path / "failed", fails_at=3).status == "failed: ValueError: no <data>"
    assert train(tmp_path / "stopped", max_time=1e-9).status == "stopped: max_time=1e-09 reached"


def test_a_run_that_still_runs_differs_from_one_that_was_killed(tmp_path: Path) -> None:
    with FORK.Pool(1) as pool:
        run = pool.apply(train, (tmp_path,), {"fails_at": 21})
        lines = [line for line in read_all(run.path) if line["kind"] != "end"]
        path, process = write_lines(run.path, *lines), pool.apply(os.getpid)
        assert read_run(path).status == f"running: process {process}"
    killed = read_run(path)
    assert (killed.status, killed.step) == ("killed", 20)
    assert killed.seconds is not None
    assert killed.seconds >= 0
    lines[0]["environment"]["host"] = "another host"
    assert read_run(write_lines(path, *lines)).status == "unknown: killed, or still running"


@pytest.mark.parametrize("process", ["0", "-1", "9" * 30, "9" * 5000, "one", ""])
def test_a_number_that_no_process_has_is_unknown(process: str, tmp_path: Path) -> None:
    run = train(tmp_path, fails_at=3)
    lines = [line for line in read_all(run.path) if line["kind"] != "end"]
    lines[0]["environment"]["process"] = process
    assert read_run(write_lines(run.path, *lines)).status == "unknown: killed, or still running"


def test_a_run_that_was_resumed_was_killed_before(tmp_path: Path) -> None:
    run = train(tmp_path, fails_at=27)
    lines = [line for line in read_all(run.path) if line["kind"] != "end"]
    resumed = {**lines[0], "kind": "resumed", "step": 15, "seconds": 1.0}
    attempts = read_run(write_lines(run.path, *lines, resumed)).attempts
    assert [attempt.status for attempt in attempts] == ["killed", f"running: process {os.getpid()}"]


def test_a_resumed_run_that_was_killed_is_at_the_step_of_its_checkpoint(tmp_path: Path) -> None:
    run = train(tmp_path, fails_at=27)
    lines = read_all(run.path)
    cut = [line for line in lines if line.get("step", 0) <= 15 or line["kind"] == "end"]
    resumed = {**lines[0], "kind": "resumed", "step": 15, "seconds": 1.0}
    assert read_run(write_lines(run.path, *cut, resumed)).step == 15


def test_options_with_their_origin_and_the_environment_are_read(tmp_path: Path) -> None:
    (attempt,) = train(tmp_path).attempts
    assert attempt.settings()["checkpoint_every"] == ("Steps(n=15)", "argument")
    assert attempt.settings()["keep_last"] == ("None", "default of CheckpointMixin")
    assert attempt.settings()["max_steps"] == ("50", "argument of train()")
    assert attempt.settings()["optimizer"] == ("SGD(lr=0.1, momentum=0.9)", "argument")
    assert attempt.environment["processes"] == "1"
    assert attempt.trainer["parameters"] == "10"


def test_checkpoints_are_found_when_the_files_are_moved_together(tmp_path: Path) -> None:
    train(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    run = read_run(tmp_path / "there" / "history.jsonl")
    assert [entry.manifest.step for entry in run.checkpoints if entry.manifest] == [15, 30, 45, 50]


def test_a_damaged_checkpoint_is_a_problem_of_the_run(tmp_path: Path) -> None:
    train(tmp_path)
    (tmp_path / "step-00000030" / "manifest.json").write_text("{}")
    run = read_run(tmp_path / "history.jsonl")
    assert len(run.checkpoints) == 3
    assert [problem.split(":")[:2] for problem in run.problems] == [["step-00000030", " damaged"]]


def test_a_run_without_a_history_file_has_the_values_of_its_checkpoints(tmp_path: Path) -> None:
    train(tmp_path)
    (tmp_path / "history.jsonl").unlink()
    run = read_run(tmp_path)
    assert [*run.values["eval_loss"]] == [30, 50]
    assert (run.step, run.status) == (50, "unknown: no history file")


def test_an_incomplete_last_line_is_left_out(tmp_path: Path) -> None:
    values = {"kind": "values", "step": 5, "epoch": 1, "values": {"epoch": 1, "train_loss": 0.5}}
    path = write_lines(tmp_path / "history.jsonl", HEADER, values)
    path.write_text(path.read_text() + '{"kind": "values", "st')
    assert read_run(path).values == {"train_loss": {5: 0.5}}


def test_values_that_are_not_finite_are_read(tmp_path: Path) -> None:
    texts = enumerate(["null", "-1e999", "1"])
    lines = [f'{{"kind": "values", "step": {step}, "values": {{"x": {text}}}}}' for step, text in texts]
    values = read_run(write_lines(tmp_path / "history.jsonl", HEADER, *lines)).values["x"]
    assert math.isnan(values[0])
    assert (values[1], values[2]) == (-math.inf, 1.0)


def test_the_best_value_is_that_of_the_first_monitor_with_values(tmp_path: Path) -> None:
    header = {**HEADER, "monitors": [["f1", "max"], ["accuracy", "max"]]}
    lines = [{"kind": "values", "step": n, "values": {"accuracy": a}} for n, a in enumerate([0.5, 0.7, None, 0.6])]
    assert read_run(write_lines(tmp_path / "history.jsonl", header, *lines)).best == ("accuracy", 1, 0.7)


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        "[]",
        "{}",
        {"kind": "values", "step": -1, "values": {}},
        {"kind": "values", "step": 1.5, "values": {}},
        {"kind": "values", "step": 1, "values": {"x": "high"}},
        {"kind": "values", "step": 1, "values": [1]},
        {"kind": "evaluation", "step": 1},
        {"kind": "end", "step": 1, "time": "noon", "seconds": 1, "reason": None, "error": None},
        {"kind": "resumed", "step": 1, "options": {"a": "b"}},
        {"kind": "resumed", "monitors": [["accuracy", "best"]]},
        "[" * 100_000,
    ],
)
def test_a_damaged_line_is_named(line: object, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "history.jsonl", HEADER, line)
    with pytest.raises(OptionError, match=r"history.jsonl is damaged: line 2 cannot be read \("):
        read_run(path)


@pytest.mark.parametrize("content", ["", "loss,accuracy\n", '{"kind": "step", "step": 1}\n'])
def test_a_foreign_file_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(OptionError, match=r"log.jsonl is not a history file"):
        read_run(tmp_path / "log.jsonl")


def test_the_title_is_short_and_never_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x").mkdir()
    for name, title in (("x/history.jsonl", "x"), ("x/a.jsonl", "x/a"), ("history.jsonl", tmp_path.name)):
        assert read_run(write_lines(Path(name), HEADER)).title == title
