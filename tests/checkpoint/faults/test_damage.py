"""Damage to any file of a checkpoint is named, and the newest one that is whole is found behind it."""

import itertools
import random
import shutil
from pathlib import Path

import pytest

from ptacc.errors import DamagedCheckpointError
from ptacc.storage.store import CheckpointStore
from tests.checkpoint.faults.arenas import FILES, save

FLIPS, TRUNCATIONS = 1000, 200
"""How many are proved, of all files together."""
SLICE = 5
"""Of how many the tests of every day make one."""


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> CheckpointStore:
    """Return a store of three checkpoints."""
    store = CheckpointStore(str(shutil.copytree(whole, tmp_path / "store")))
    save(store, 3)
    return store


def check_passed_over(store: CheckpointStore, *names: str) -> None:
    """Check that checkpoints are named as damaged, and the newest of the others is found."""
    found, passed_over = store.newest()
    assert found is not None
    assert found.name == max({"step-1", "step-2", "step-3"} - {*names})
    assert {*passed_over} == {*names}
    assert all(isinstance(error, DamagedCheckpointError) for error in passed_over.values())


def flip(data: bytes, chance: random.Random) -> bytes:
    bit = chance.randrange(8 * len(data))
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def flip_and_truncate(store: CheckpointStore, file: str, part: int) -> None:
    """Damage a file by its share of the flips and truncations, or by one in `part` of those."""
    path, chance = Path(store.directory) / "step-3" / file, random.Random(file)
    data = path.read_bytes()
    flipped = [flip(data, chance) for _ in range(FLIPS // len(FILES) // part)]
    truncated = [data[: chance.randrange(len(data))] for _ in range(TRUNCATIONS // len(FILES) // part)]
    for damaged in (*flipped, *truncated, b"", data[:-1], data + b"\0"):
        path.write_bytes(damaged)
        check_passed_over(store, "step-3")


@pytest.mark.parametrize("file", FILES)
def test_flipped_bits_and_truncations_are_found(file: str, store: CheckpointStore) -> None:
    flip_and_truncate(store, file, SLICE)


@pytest.mark.prove
@pytest.mark.parametrize("file", FILES)
def test_a_thousand_flipped_bits_and_two_hundred_truncations_are_found(file: str, store: CheckpointStore) -> None:
    flip_and_truncate(store, file, 1)


@pytest.mark.parametrize("count", range(1, 1 + len(FILES)))
def test_missing_files_are_found(count: int, store: CheckpointStore) -> None:
    for missing in itertools.combinations(FILES, count):
        data = {file: (Path(store.directory) / "step-3" / file).read_bytes() for file in missing}
        for file in missing:
            (Path(store.directory) / "step-3" / file).unlink()
        check_passed_over(store, "step-3")
        for file in missing:
            (Path(store.directory) / "step-3" / file).write_bytes(data[file])
    check_passed_over(store)


@pytest.mark.parametrize("one", FILES)
@pytest.mark.parametrize("other", FILES)
def test_swapped_files_are_found(one: str, other: str, store: CheckpointStore) -> None:
    first, second = Path(store.directory) / "step-2" / one, Path(store.directory) / "step-3" / other
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    check_passed_over(store, "step-2", "step-3")


@pytest.mark.parametrize("pair", [*itertools.combinations(FILES, 2)], ids="-".join)
def test_files_of_one_checkpoint_that_are_swapped_are_found(pair: tuple[str, str], store: CheckpointStore) -> None:
    first, second = (Path(store.directory) / "step-3" / file for file in pair)
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    check_passed_over(store, "step-3")
