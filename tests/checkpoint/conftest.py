"""Stores to attack."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ptacc.storage.store import CheckpointStore
from tests.checkpoint.faults.arenas import FILES, Arena, save, visit


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    for step in (1, 2):
        save(CheckpointStore(str(path)), step)
    visit(CheckpointStore(str(path)))  # so that what is imported when it is first needed is there before the cells
    assert sorted(file.name for file in (path / "step-2").iterdir()) == [*FILES]
    return path


@pytest.fixture
def arena(whole: Path, tmp_path: Path) -> Iterator[Arena]:
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b'{"model": "a secret"}')
    yield Arena(whole, tmp_path)
    shutil.rmtree(tmp_path / "inside")  # pytest would keep hundreds of stores, and files of terabytes
