"""A run on a GPU that is killed and resumed ends as one that was not, to the last bit."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import launch

SCRIPT = str(Path(__file__).parent / "scripts" / "killed.py")


def run(directory: Path, *killed_after: str) -> tuple[int, str]:
    ended = launch([sys.executable, SCRIPT, str(directory), *killed_after], timeout=100)
    assert ended.returncode in {0, -signal.SIGKILL}, ended.stderr
    return ended.returncode, ended.stdout


@pytest.mark.timeout(300)
@pytest.mark.parametrize("step", ["4", "11"])
def test_a_resumed_run_equals_an_uninterrupted_run(device: torch.device, tmp_path: Path, step: str) -> None:
    _, whole = run(tmp_path / "whole")
    assert run(tmp_path / "killed", step) == (-signal.SIGKILL, "")
    _, resumed = run(tmp_path / "killed")
    expected: dict[str, Any] = json.loads(whole)
    assert json.loads(resumed) == expected
    assert expected["device"] == device.type
    assert expected["steps"] > int(step)
