"""The command line lists and verifies checkpoints, exports weights that a model can load, and reports on runs."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ptacc.checkpoint.catalog import list_checkpoints
from ptacc.checkpoint.export import write_weights
from ptacc.checkpoint.parts import SHARED, encode_parts, write_parts
from ptacc.cli import main
from ptacc.errors import CheckpointError
from ptacc.files.filesystem import FileSystem
from ptacc.model.averaging import AveragedWeights
from ptacc.storage.manifest import Manifest
from ptacc.storage.store import CheckpointStore
from tests.checkpoint.faults.disks import CALLS, Interposed, Losing, failing_at
from tests.report.runs import train

LIMIT = 60
"""Time limit of a process in seconds; on a busy machine, importing torch takes most of it."""


class Tied(nn.Module):
    """A model with tied weights, an integer buffer, and a buffer that is not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embed.weight
        self.register_buffer("cache", torch.ones(2), persistent=False)


def save(
    directory: Path, step: int, parts: dict[str, object] | None = None, key: bytes | None = None, **values: Any
) -> Path:
    """Save a checkpoint, by default of a model."""
    store = CheckpointStore(str(directory), key)
    pending = store.begin(values.pop("name", f"step-{step:04}"))
    files = write_parts(store, pending, SHARED, encode_parts(parts or {"model": Tied().state_dict()}))
    store.commit(pending, replace(Manifest("", "a run", step, 1, 0, 1, files=files), **values))
    return directory / pending.name


def damage(checkpoint: Path) -> None:
    file = checkpoint / "shared.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def column(output: str, number: int) -> list[str]:
    return [line.split()[number] for line in output.splitlines()[1:]]


# ---- ptacc checkpoints


def test_checkpoints_are_listed_by_run_and_then_by_age(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for directory in ("run-10", "run-2", "."):
        save(tmp_path / directory, 30, label="best", metrics={"loss": 0.25})
        save(tmp_path / directory, 20)
    save(tmp_path, 21, name="mine")
    assert main(["checkpoints", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    first = ["step-0030", "step-0020", "mine"]
    later = [f"run-{n}/step-00{step}" for n in (2, 10) for step in (30, 20)]
    assert column(table, 0) == first + later
    assert column(table, 1)[:3] == ["30", "20", "21"]
    assert column(table, 3)[:3] == ["0.25", "-", "-"]


def test_the_table_is_aligned_and_says_what_was_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1, {"model": {"w": torch.zeros(300)}}, metrics={"loss": 1.5}, label="best")
    main(["checkpoints", str(tmp_path)])
    main(["checkpoints", "--verify", str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [
        "name       step  epoch  loss     size  label  state",
        "step-0001     1      1   1.5  1.3 KiB  best   manifest intact, files not read",
        "name       step  epoch  loss     size  label  state",
        "step-0001     1      1   1.5  1.3 KiB  best   intact",
    ]


def test_damage_in_a_file_is_found_with_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(save(tmp_path, 1))
    assert main(["checkpoints", str(tmp_path)]) == 0
    assert "files not read" in capsys.readouterr().out
    assert main(["checkpoints", str(tmp_path), "--verify"]) == 1
    assert "damaged: " in (table := capsys.readouterr().out)
    assert "its hash differs" in table
    assert column(table, 1) == ["1"]


def test_damage_in_a_manifest_is_found_without_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = save(tmp_path, 1) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"step": 1', b'"step": 2'))
    save(tmp_path, 2)
    assert main(["checkpoints", str(tmp_path)]) == 1
    table = capsys.readouterr().out
    assert column(table, 0) == ["step-0002", "step-0001"]
    assert "damaged: " in table.splitlines()[2]


def test_a_json_listing_is_valid_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1, metrics={"loss": float("nan"), "accuracy": 0.5})
    save(tmp_path / "run-2", 2)
    (tmp_path / "run-2" / "step-0002" / "manifest.json").unlink()
    assert main(["checkpoints", str(tmp_path), "--json"]) == 1
    first, second = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert first["metrics"] == {"loss": "nan", "accuracy": 0.5}
    assert (first["name"], first["checked"], first["problem"]) == ("step-0001", "manifest", None)
    assert (second["name"], "no manifest" in second["problem"]) == ("run-2/step-0002", True)


@pytest.mark.parametrize("command", ["checkpoints", "verify"])
@pytest.mark.parametrize("name", [".", "missing"])
def test_a_folder_without_checkpoints_is_reported(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CheckpointStore(str(tmp_path)).begin("step-0001")
    assert main([command, str(tmp_path / name)]) == 1
    assert "ptacc: no checkpoints in" in capsys.readouterr().err


def test_control_characters_of_a_label_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1, label="a\nb\x1b[31m")
    main(["checkpoints", str(tmp_path)])
    assert r"'a\nb\x1b[31m'" in capsys.readouterr().out


def test_a_checkpoint_that_a_run_removes_is_not_damaged(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (found,) = list_checkpoints(str(tmp_path), None)
    found.store.remove("step-0001")
    assert found.check(files=True).is_gone
    assert not found.is_gone


# ---- ptacc verify


def test_each_checkpoint_is_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(save(tmp_path, 1))
    save(tmp_path / "run-2", 2)
    assert main(["verify", str(tmp_path)]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step-0001        damaged: ")
    assert second == "run-2/step-0002  intact"
    assert main(["verify", str(tmp_path / "run-2")]) == 0


def test_one_checkpoint_is_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, bare = save(tmp_path, 1), save(tmp_path, 2)
    monkeypatch.chdir(whole)
    assert main(["verify", "."]) == 0
    assert capsys.readouterr().out == ".  intact\n"
    (bare / "manifest.json").unlink()
    assert main(["verify", str(bare)]) == 1
    assert "no manifest" in capsys.readouterr().out


def test_a_folder_of_checkpoints_may_be_named_like_a_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "step-size-3", 1)
    assert main(["verify", str(tmp_path / "step-size-3")]) == 0


def test_a_key_is_read_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "runs", 1, key=b"secret")
    right, wrong, empty = (tmp_path / name for name in ("right", "wrong", "empty"))
    right.write_bytes(b"secret \r\n")
    wrong.write_bytes(b"guess\n")
    empty.write_bytes(b"\n")
    codes = [main(["verify", str(tmp_path / "runs"), "--key-file", str(file)]) for file in (right, wrong, empty)]
    assert codes == [0, 1, 2]
    said = capsys.readouterr()
    assert "refused: step-0001 is not signed with the key" in said.out
    assert said.err == f"ptacc: {empty} is empty: it must contain the key.\n"


# ---- ptacc runs and ptacc report


def test_the_runs_below_a_directory_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "runs" / "b", max_steps=20)
    train(tmp_path / "runs" / "a", fails_at=13)
    assert main(["runs", str(tmp_path)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["path", "status", "step", "best", "last", "started", "duration"]
    first, second = ([*re.split(r"  +", row)] for row in rows)
    assert first[:3] == [str(tmp_path / "runs" / "a"), "failed: ValueError: no <data>", "13 of 50"]
    assert second[1:3] == ["complete", "20 of 20"]
    assert second[3].startswith("eval_loss 0.")
    assert re.match(r"train_loss 0\.\d+, eval_loss 0\.", second[4])


def test_a_json_listing_of_runs_is_valid_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, fails_at=27)
    train(tmp_path, max_steps=30)
    main(["runs", str(tmp_path), "--json"])
    (run,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (run["step"], run["planned"], run["resumed"], run["status"]) == (30, 30, 1, "complete")
    assert (run["best"]["name"], run["best"]["step"]) == ("eval_loss", 30)


def test_a_damaged_run_is_reported_and_the_others_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = train(tmp_path / "a", max_steps=10).path
    train(tmp_path / "b", max_steps=10)
    damaged.write_text(damaged.read_text().replace('"kind": "epoch"', "").replace('"kind": "values"', '"kind" "v'))
    assert main(["runs", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2
    assert f"ptacc: {damaged} is damaged: line " in said.err
    assert main(["runs", str(tmp_path / "b" / "step-00000010")]) == 1
    assert "ptacc: no runs in" in capsys.readouterr().err


def test_the_page_of_a_run_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "x", max_steps=10)
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "x"), "-o", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}: {tmp_path / 'x'}\n"
    assert page.read_text(encoding="utf-8").startswith('<!DOCTYPE html>\n<html lang="en">')


def test_what_has_no_run_has_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "runs" / "x", max_steps=10)
    (tmp_path / "notes.txt").write_text("to do")
    for path in ("runs", "notes.txt", "missing"):
        assert main(["report", str(tmp_path / path), "-o", str(tmp_path / "page.html")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert f"runs has neither a history file nor checkpoints. Name one of its runs: {tmp_path}/runs/x/h" in said[0]
    assert "notes.txt is not a history file" in said[1]
    assert "missing" in said[2]
    assert not (tmp_path / "page.html").exists()


# ---- ptacc export


def load_exported(path: Path) -> Tied:
    """Load the weights of a file into a new model, and check that all names and values agree."""
    torch.manual_seed(1)
    model = Tied()
    weights = load_file(path)
    model.load_state_dict(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    return model


def test_tied_weights_are_exported_under_all_names(tmp_path: Path) -> None:
    model = Tied()
    checkpoint = save(tmp_path, 1, {"model": model.state_dict()})
    assert main(["export", str(checkpoint), str(tmp_path / "out")]) == 0
    assert load_file(tmp_path / "out").keys() == model.state_dict().keys()
    assert torch.equal(load_exported(tmp_path / "out").embed.weight, model.embed.weight)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_tied_averages_are_exported_under_all_names(kind: str, tmp_path: Path) -> None:
    model = Tied()
    averages = AveragedWeights(model)
    with torch.no_grad():
        model.embed.weight += 2
    averages.update(model, weight=0.5)
    checkpoint = save(tmp_path, 1, {"model": model.state_dict(), kind: averages.state_dict()})
    assert main(["export", str(checkpoint), str(tmp_path / "out"), "--averages", kind]) == 0
    there = load_exported(tmp_path / "out")
    assert torch.equal(there.embed.weight, averages.tensors["embed.weight"])
    assert not torch.equal(there.embed.weight, model.embed.weight)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "no part 'model'. It has: other"),
        ({"model": {"w": torch.ones(1)}}, "no part 'ema'. It has: model, other"),
        ({"model": {"w": torch.ones(1)}, "ema": {"updates": 0, "averages": {}}}, "have not been updated yet"),
        ({"model": {"w": torch.ones(1)}, "ema": 3}, "does not contain averaged weights"),
        ({"model": [1]}, "is a list: weights must be tensors by name"),
        ({"model": {"a._extra_state": {}}}, "'a._extra_state'] is a dict"),
        ({"model": {"__metadata__": torch.ones(1)}}, "cannot store under that name"),
    ],
)
def test_a_state_that_cannot_be_exported_is_reported(
    parts: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1, {"other": 1, **parts})
    assert main(["export", str(tmp_path), str(tmp_path / "out"), "--averages", "ema"]) == 2
    assert message in (said := capsys.readouterr().err)
    assert said.startswith("ptacc: ")
    assert not (tmp_path / "out").exists()


def test_the_newest_valid_checkpoint_of_a_folder_is_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Tied()
    save(tmp_path, 9)
    save(tmp_path / "run-2", 1, {"model": model.state_dict()})
    damage(save(tmp_path / "run-2", 2))
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "the weights of run-2/step-0001, 8 tensors" in said.out
    assert "ptacc: run-2/step-0002 is skipped: damaged" in said.err
    assert torch.equal(load_exported(tmp_path / "out").embed.weight, model.embed.weight)


def test_other_files_of_a_given_checkpoint_are_not_verified(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1)
    (checkpoint / "stray").touch()
    assert main(["export", str(checkpoint), str(tmp_path / "one")]) == 0
    assert main(["export", str(tmp_path), str(tmp_path / "newest")]) == 2
    damage(checkpoint)
    assert main(["export", str(checkpoint), str(tmp_path / "two")]) == 2


def test_a_file_is_overwritten_only_with_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, out = save(tmp_path / "runs", 1), tmp_path / "out"
    out.write_text("mine")
    assert main(["export", str(checkpoint), str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert main(["export", str(checkpoint), str(out), "--force"]) == 0
    load_exported(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]


@pytest.mark.parametrize(
    "out", ["runs", "no/such/directory", "runs/step-0001/shared.safetensors", "runs/step-0001/new"]
)
def test_invalid_targets_are_never_written_to(out: str, tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "runs", 1)
    assert main(["export", str(checkpoint), str(tmp_path / out), "--force"]) == 2
    assert main(["verify", str(checkpoint)]) == 0


def test_a_missing_directory_is_not_created_for_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save(tmp_path / "runs", 1)
    assert main(["export", str(checkpoint), str(tmp_path / "missing" / "weights")]) == 2
    assert f"The directory {tmp_path / 'missing'} does not exist" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    weights, others = Tied().state_dict(), Tied().state_dict()
    calls: list[str] = []
    write_weights(Interposed(lambda number, name, _: calls.append(name)), str(tmp_path / "out"), weights)
    before = (tmp_path / "out").read_bytes()
    for number in range(calls.index("rename") + 1):
        with pytest.raises(CheckpointError, match=r"was not written: .*No space"):
            write_weights(failing_at(number, 28, frozenset(CALLS)), str(tmp_path / "out"), others, overwrite=True)
        assert (tmp_path / "out").read_bytes() == before
        assert len(list(tmp_path.iterdir())) == 1


def test_an_unsupported_dtype_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot store"):
        write_weights(FileSystem(), str(tmp_path / "out"), {"w": torch.zeros(1, dtype=torch.complex128)})
    assert list(tmp_path.iterdir()) == []


def test_an_exported_file_survives_a_power_loss(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    disk = Losing(tmp_path / "here")
    write_weights(disk, str(tmp_path / "here" / "out"), Tied().state_dict())
    disk.leave(tmp_path / "left")
    load_exported(tmp_path / "left" / "out")


# ---- the program


def start(*arguments: str | Path, **streams: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ptacc", *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.Popen(command, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, **streams)


def finish(process: subprocess.Popen[str]) -> tuple[int, Sequence[str | None]]:
    """Return the exit code and the output of a process. It may not take longer than `LIMIT`."""
    with process:
        try:
            written = process.communicate(timeout=LIMIT)
        finally:
            process.kill()
    return process.returncode, written


def test_the_package_runs_as_a_module(tmp_path: Path) -> None:
    save(tmp_path, 1, label="größer")
    code, (out, err) = finish(start("checkpoints", tmp_path))
    assert (code, err) == (0, "")
    assert r"gr\xf6\xdfer" in str(out)


def test_a_closed_pipe_ends_the_program_quietly(tmp_path: Path) -> None:
    save(tmp_path, 1)
    reads, writes = os.pipe()
    os.close(reads)
    process = start("checkpoints", tmp_path, stdout=writes)
    os.close(writes)
    assert finish(process) == (128 + signal.SIGPIPE, (None, ""))


def test_an_interrupt_ends_the_program_quietly(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "key")
    process = start("verify", tmp_path, "--key-file", tmp_path / "key")
    with (tmp_path / "key").open("wb"):  # blocks until the process opens the pipe for reading
        process.send_signal(signal.SIGINT)
        assert finish(process) == (128 + signal.SIGINT, ("", ""))


def test_a_missing_file_is_reported_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path), "--key-file", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("ptacc: [Errno 2] No such file")


@pytest.mark.parametrize(("argument", "expected"), [("--version", "ptacc 0.1.0"), ("--help", "checkpoints")])
def test_version_and_help_are_printed(argument: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([argument])
    assert expected in capsys.readouterr().out


def test_the_project_installs_the_program() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    module, _, name = project["project"]["scripts"]["ptacc"].partition(":")
    assert getattr(importlib.import_module(module), name) is main
