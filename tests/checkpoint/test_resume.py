"""A run that resumes from any of its steps ends as one that was never killed, to the last bit."""

import os
from pathlib import Path
from typing import Any

import pytest

from ptacc import Steps
from tests.checkpoint.resumed import End, killed_after, run
from tests.ranks import run_ranks


def resume_from_every_step(directory: Path, accumulation: int, workers: int, batch_size: int) -> tuple[int, list[str]]:
    """Run, resume from each of its checkpoints, and return how many there were and what came out differently."""
    options: dict[str, Any] = {
        "workers": workers,
        "batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
    }
    whole = run(directory / "whole", checkpoint_every=Steps(1), **options)
    names = sorted(path.name for path in (directory / "whole").glob("step-*"))
    found: list[str] = []
    for name in names:
        into = directory / f"after-{name}-{accumulation}-{workers}"
        found += [
            f"{name}: {what}" for what in resume_from(directory / "whole", name, into, options).differences(whole)
        ]
    return len(names), found


def resume_from(directory: Path, name: str, into: Path, options: dict[str, Any]) -> End:
    if os.environ.get("RANK", "0") == "0":
        killed_after(directory, name, into)
    return run(into, resume=True, checkpoint_every=Steps(1), **options)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.prove)])
def test_a_run_resumes_from_every_step(tmp_path: Path, accumulation: int, workers: int) -> None:
    assert resume_from_every_step(tmp_path, accumulation, workers, 4) == ({1: 15, 3: 6}[accumulation], [])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.prove), 3])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.prove)])
def test_so_does_a_run_of_two_processes(tmp_path: Path, accumulation: int, workers: int) -> None:
    ends = run_ranks(resume_from_every_step, 2, tmp_path, accumulation, workers, 2, timeout=300)
    assert ends == [({1: 15, 3: 6}[accumulation], [])] * 2
