"""On a GPU, a run that is killed and resumed ends bit-identical to an uninterrupted run."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import launch

SCRIPT = str(Path(__file__).parent / "scripts" / "killed.py")


def run(directory: Path, how: str, *killed_after: str) -> tuple[int, str]:
    done = launch([sys.executable, SCRIPT, str(directory), how, *killed_after], timeout=100)
    assert done.returncode in {0, -signal.SIGKILL}, done.stderr
    return done.returncode, done.stdout


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("how", "step"), [("foreground", "4"), ("foreground", "11"), ("background", "11")])
def test_a_resumed_run_equals_an_uninterrupted_run(device: torch.device, tmp_path: Path, how: str, step: str) -> None:
    _, uninterrupted = run(tmp_path / "uninterrupted", how)
    assert run(tmp_path / "killed", how, step) == (-signal.SIGKILL, "")
    _, resumed = run(tmp_path / "killed", how)
    expected: dict[str, Any] = json.loads(uninterrupted)
    assert json.loads(resumed) == expected
    assert expected["device"] == device.type
    assert expected["steps"] > int(step)
