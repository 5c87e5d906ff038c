"""A script gives the same numbers under every launch form, and exits without errors."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from tests.ranks import find_free_port, launch

SCRIPTS = Path(__file__).parent / "scripts"
BIN = Path(sys.executable).parent
ON_CPU = {"ACCELERATE_USE_CPU": "true"}
BAD_WORDS = ("terminate called", "Traceback", "leaked", "Warning")
RELATIVE = 1e-12


@dataclass(frozen=True)
class Form:
    command: tuple[str, ...]
    world_size: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)


ACCELERATE = (str(BIN / "accelerate"), "launch", "--num_machines", "1", "--mixed_precision", "no")
SETTINGS = ("--dynamo_backend", "no", "--num_cpu_threads_per_process", "1")
NPROC = ("--standalone", "--nproc-per-node", "2")
PYTHON = Form((sys.executable,))
TORCHRUN = Form((str(BIN / "torchrun"), *NPROC), 2, ON_CPU)
FORMS = {
    "accelerate launch, 1 process": Form((*ACCELERATE, *SETTINGS, "--cpu", "--num_processes", "1")),
    "accelerate launch, 2 processes": Form((*ACCELERATE, *SETTINGS, "--multi_gpu", "--num_processes", "2"), 2, ON_CPU),
    "torchrun": TORCHRUN,
    "python -m torch.distributed.run": Form((sys.executable, "-m", "torch.distributed.run", *NPROC), 2, ON_CPU),
}


def run(form: Form, script: str, *arguments: str) -> CompletedProcess[str]:
    port = ("--main_process_port", str(find_free_port())) if "--multi_gpu" in form.command else ()
    return launch([*form.command, *port, str(SCRIPTS / script), *arguments], env=form.environment, timeout=60)


def read_reports(ended: CompletedProcess[str]) -> list[dict[str, Any]]:
    """Check that the command succeeded without warnings, and return the reports that rank 0 printed."""
    assert ended.returncode == 0, ended.stderr
    assert not [word for word in BAD_WORDS if word in ended.stderr], ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The report of `python tiny.py`."""
    (report,) = read_reports(run(PYTHON, "tiny.py"))
    return report


def test_python_runs_one_process(alone: dict[str, Any]) -> None:
    assert (alone["world_size"], len(alone["losses"]), alone["predictions"]) == (1, 6, 13)


@pytest.mark.parametrize(
    "name",
    [
        "accelerate launch, 1 process",
        "accelerate launch, 2 processes",
        "torchrun",
        pytest.param("python -m torch.distributed.run", marks=pytest.mark.prove),
    ],
)
def test_every_form_gives_the_same_numbers(name: str, alone: dict[str, Any]) -> None:
    (report,) = read_reports(run(FORMS[name], "tiny.py"))
    assert report["world_size"] == FORMS[name].world_size
    for key in report.keys() - {"world_size", "seen"}:
        assert report[key] == pytest.approx(alone[key], rel=RELATIVE, abs=0), key


@pytest.mark.parametrize("what", ["method", pytest.param("function", marks=pytest.mark.prove)])
@pytest.mark.parametrize("launcher", ["notebook_launcher", "debug_launcher"])
def test_a_trainer_made_before_the_fork_is_launched_twice(launcher: str, what: str, alone: dict[str, Any]) -> None:
    script = Form((sys.executable,), 2, ON_CPU)
    reports = read_reports(run(script, "notebook.py", launcher, what, str(find_free_port())))
    assert [report["world_size"] for report in reports] == [2, 2]
    for report in reports:
        assert report["losses"] == pytest.approx(alone["losses"], rel=RELATIVE, abs=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the processes see each other")
def test_torchrun_without_the_variable_for_the_cpu_raises() -> None:
    ended = run(Form(TORCHRUN.command, environment={"ACCELERATE_USE_CPU": "false"}), "tiny.py")
    assert ended.returncode != 0
    assert "LaunchError: WORLD_SIZE=2, and Accelerate sees 1 process" in ended.stderr
    assert "{" not in ended.stdout


def count_bad_ends(script: str, times: int) -> int:
    ends = [run(TORCHRUN, script) for _ in range(times)]
    return sum(ended.returncode != 0 or ended.stderr != "" for ended in ends)


def test_a_script_that_ends_right_after_its_training_succeeds() -> None:
    assert count_bad_ends("train_only.py", 3) == 0


@pytest.mark.prove
@pytest.mark.timeout(600)
@pytest.mark.parametrize("script", ["tiny.py", "train_only.py"])
def test_a_script_succeeds_every_time(script: str) -> None:
    assert count_bad_ends(script, 20) == 0
