"""A run that loses power at any moment and is resumed ends as one that did not, to the last bit."""

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.faults.powerless import Logged, Loss, Powerless
from tests.checkpoint.runs import STEPS, End, check_resumes, history_file, in_memory, save_each_step


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ptacc-", dir=in_memory()) as path:
        yield Path(path)


def lose_power(
    directory: Path, monkeypatch: pytest.MonkeyPatch, chance: random.Random | None, **options: Any
) -> tuple[End, list[Loss]]:
    """Return what a run ends with, and what a loss of power would have left after each of its calls."""
    root = directory / "disk"
    root.mkdir()
    disk = Powerless(root, Logged(root, history_file(root)), directory / "left", chance)
    with monkeypatch.context() as patches:
        patches.setattr(os, "fsync", disk.logged.fsync)
        end = save_each_step(root, filesystem=disk, **options)
    return end, disk.losses


def resume_after_each(losses: list[Loss], whole: End) -> None:
    for loss in losses:
        check_resumes(loss.left, whole, loss.least, loss.most)
    assert {loss.least for loss in losses} == {*range(STEPS + 1)}


@pytest.mark.parametrize("in_background", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize("seed", [None, 0], ids=["what-was-synced-is-left", "and-some-of-the-rest"])
def test_a_run_that_loses_power_resumes(
    seed: int | None, directory: Path, monkeypatch: pytest.MonkeyPatch, in_background: bool
) -> None:
    chance = None if seed is None else random.Random(seed)
    whole, losses = lose_power(directory, monkeypatch, chance, checkpoint_in_background=in_background)
    resume_after_each(losses[:: len(losses) // (STEPS + 2)], whole)


@pytest.mark.prove
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [None, 1], ids=["what-was-synced-is-left", "and-some-of-the-rest"])
def test_a_run_that_loses_power_at_any_moment_resumes(
    seed: int | None, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, losses = lose_power(directory, monkeypatch, None if seed is None else random.Random(seed))
    some = losses[::3]
    assert len(some) >= 60
    resume_after_each(some, whole)
