"""A disk that fails while a run is saved: what was saved before is whole, and the error says what failed, and where."""

import errno
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from ptacc.errors import CheckpointError, RankFailedError
from ptacc.files.filesystem import FileSystem
from ptacc.storage.store import CheckpointStore
from ptacc.testing import tiny_parts
from tests.checkpoint.faults.failing import (
    OPENING,
    ROTATION,
    Call,
    Failing,
    calls_of_a_run,
    check_directory,
    check_resumes,
    make,
    outcome,
    same,
    train,
    writers,
)
from tests.ranks import run_ranks

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)
OnError = Literal["raise", "warn"]


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[Call]:
    """Return the calls of a healthy run."""
    return calls_of_a_run(tmp_path_factory.mktemp("calls") / "run")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    """Return the weights of a healthy run."""
    return train(make(tmp_path_factory.mktemp("expected")))


# ---- one process


def fail_and_check(
    directory: Path, disk: Failing, call: Call, expected: list[Tensor], on_error: OnError, *, in_background: bool
) -> None:
    """Let a run save itself to a disk that fails, and check all that has to be so then."""
    trainer = make(directory, filesystem=disk, checkpoint_errors=on_error, checkpoint_in_background=in_background)
    ended, warned = outcome(trainer)
    assert writers() == []
    check_directory(directory, disk.committed)

    is_of_a_save = call.phase != ROTATION or (disk.lasting and call.save < 3)
    is_raised = call.phase == OPENING or (is_of_a_save and on_error == "raise")
    assert isinstance(ended, CheckpointError) == is_raised
    assert isinstance(ended, CheckpointError) or same(ended, expected)
    first = str(ended) if is_raised and call.phase != ROTATION else warned[0]
    assert os.strerror(disk.error) in first
    assert (directory / call.path).resolve().name in first
    assert bool(warned) == (call.phase == ROTATION or not is_raised)
    check_resumes(directory, expected)


def fail_at(
    numbers: range, calls: list[Call], expected: list[Tensor], directory: Path, error: int | None, **how: Any
) -> None:
    lasting = how.pop("lasting")
    for number in numbers:
        (directory / str(number)).mkdir()
        disk = Failing(number, error or ERRORS[number % 3], lasting=lasting)
        fail_and_check(directory / str(number) / "run", disk, calls[number], expected, **how)
        shutil.rmtree(directory / str(number))


WAYS = [*itertools.product(("raise", "warn"), (False, True), (False, True))]


@pytest.mark.parametrize(("on_error", "in_background", "lasting"), WAYS)
def test_a_disk_that_fails_leaves_what_was_saved_and_is_named(
    calls: list[Call], expected: list[Tensor], tmp_path: Path, on_error: OnError, in_background: bool, lasting: bool
) -> None:
    numbers = range(WAYS.index((on_error, in_background, lasting)), len(calls), 24)
    fail_at(numbers, calls, expected, tmp_path, None, on_error=on_error, in_background=in_background, lasting=lasting)


@pytest.mark.prove
@pytest.mark.timeout(600)
@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.__getitem__)
@pytest.mark.parametrize(("on_error", "in_background", "lasting"), WAYS)
def test_a_disk_that_fails_at_any_call_leaves_what_was_saved_and_is_named(
    calls: list[Call],
    expected: list[Tensor],
    tmp_path: Path,
    on_error: OnError,
    in_background: bool,
    lasting: bool,
    error: int,
) -> None:
    numbers = range(len(calls))
    fail_at(numbers, calls, expected, tmp_path, error, on_error=on_error, in_background=in_background, lasting=lasting)


# ---- two processes


def outcome_of_a_rank(
    directory: Path, failing_rank: int, at: int, *, lasting: bool, **options: Any
) -> tuple[str, str, list[Tensor]]:
    """Return the kind of error and its text, or the weights; the disk of one rank fails, and is whole in the end."""
    rank = int(os.environ["RANK"])
    disk = Failing(at, errno.ENOSPC, lasting=lasting) if rank == failing_rank else FileSystem()
    try:
        ended, warned = outcome(make(directory, filesystem=disk, **options))
    except RankFailedError as error:
        return "RankFailedError", str(error), []
    if isinstance(ended, CheckpointError):
        return type(ended).__name__, str(ended), []
    return "", " ".join(warned), ended


TWO = [
    # The disk of rank 1 is too full to leave word of it.
    pytest.param(1, 1, True, False),
    pytest.param(1, 1, True, True),
    # It fails once, and rank 1 leaves word of it.
    pytest.param(1, 7, False, False),
    pytest.param(0, 17, False, False),
    *(
        pytest.param(rank, at, lasting, background, marks=pytest.mark.prove)
        for rank, at in ((0, 5), (0, 23), (1, 0), (1, 7), (1, 10), (1, 12), (1, 14))
        for lasting in (False, True)
        for background in (False, True)
    ),
]


def check_names_the_rank(text: str, rank: int) -> None:
    assert f"was not saved: rank {rank}: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}: '" in text


@pytest.mark.usefixtures("expected")  # what a run imports is imported before the fork then
@pytest.mark.parametrize(("rank", "at", "lasting", "background"), TWO)
def test_all_processes_raise_the_error_of_one(
    tmp_path: Path, rank: int, at: int, lasting: bool, background: bool
) -> None:
    ends = run_ranks(
        lambda: outcome_of_a_rank(tmp_path, rank, at, lasting=lasting, checkpoint_in_background=background), 2
    )
    for _, text, _ in ends:
        check_names_the_rank(text, rank)
    kinds = {kind for kind, _, _ in ends}
    assert kinds == {"CheckpointError"} or (background and kinds == {"CheckpointError", "RankFailedError"})
    check_directory(tmp_path, CheckpointStore(str(tmp_path)).names())


@pytest.mark.parametrize(("rank", "at", "lasting", "background"), TWO)
def test_all_processes_continue_without_a_checkpoint(
    expected: list[Tensor], tmp_path: Path, rank: int, at: int, lasting: bool, background: bool
) -> None:
    options: dict[str, Any] = {"checkpoint_errors": "warn", "checkpoint_in_background": background}
    first, second = run_ranks(lambda: outcome_of_a_rank(tmp_path, rank, at, lasting=lasting, **options), 2)
    check_names_the_rank(first[1], rank)
    assert "The run continues without this checkpoint." in first[1]
    assert second[1] == ""
    assert same(first[2], second[2])
    assert all(torch.allclose(mine, theirs) for mine, theirs in zip(first[2], expected, strict=True))
    names = CheckpointStore(str(tmp_path)).names()
    assert (f"step-{6:08}" in names) == (not lasting)
    check_directory(tmp_path, names)


# ---- a disk that is full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of two megabytes."""
    directory = tmp_path / "small"
    directory.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("a small disk needs mount: Debian's util-linux")
    try:
        mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "ptacc", str(directory)]
        subprocess.run(mount, check=True, capture_output=True, text=True, timeout=10)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"a small disk needs the right to mount one, and {error.cmd} failed: {error.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True, timeout=10)


def large_parts() -> dict[str, Any]:
    """Return a model whose checkpoint takes three quarters of a megabyte: the disk has room for two."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 7000), nn.Linear(7000, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    return {**tiny_parts(), "model": model, "optimizer": optimizer, "keep_last": None}


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_is_full_keeps_what_it_has_and_takes_the_run_again(
    small_disk: Path, tmp_path: Path, background: bool
) -> None:
    expected = train(make(tmp_path / "whole", **large_parts()))
    trainer = make(small_disk / "run", checkpoint_in_background=background, **large_parts())
    with pytest.raises(CheckpointError, match=r"step-00000006 was not saved: .* No space left on device: '.*shared\."):
        train(trainer)
    check_directory(small_disk / "run", ["step-00000002", "step-00000004"])

    CheckpointStore(str(small_disk / "run")).remove("step-00000002")
    check_resumes(small_disk / "run", expected, **large_parts())
