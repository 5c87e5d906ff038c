"""Whoever can write a checkpoint's files cannot make reading it run, open, change or exhaust anything."""

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from ptacc.checkpoint import parts as parts_module
from ptacc.checkpoint.parts import MAX_JSON_SIZE, SHARED, read_parts
from ptacc.errors import CheckpointError, DamagedCheckpointError, OptionError
from ptacc.files.filesystem import FileDigest, FileSystem
from ptacc.serialization.safetensors_file import safetensors_parts
from ptacc.storage.manifest import to_json
from ptacc.storage.store import MANIFEST, CheckpointStore
from tests.checkpoint.cells import ROOM, run_in_a_cell
from tests.checkpoint.faults import payloads
from tests.checkpoint.faults.arenas import (
    DAMAGED,
    FILES,
    FOUND_OUT,
    KEY,
    NAMED,
    READ,
    REFUSED,
    WHOLE,
    Arena,
    check,
    check_replaced,
    classify_outcome,
    contents,
    save,
    visit,
)
from tests.checkpoint.faults.payloads import reseal


def test_a_checkpoint_that_was_not_attacked_is_read(arena: Arena) -> None:
    check(arena, {"whole": partial(visit, arena.store())}, WHOLE)


@pytest.mark.parametrize(
    ("outcome", "trial"),
    [
        ("escaped: open", lambda arena: (arena.outside / "secret").read_bytes()),
        ("escaped: open", lambda arena: (arena.inside / "written").write_bytes(b"")),
        ("escaped: os.mkdir", lambda arena: os.mkdir(arena.inside / "made")),  # noqa: PTH102
        ("escaped: compile", lambda arena: eval("1")),
        ("raised: Traceback", lambda arena: bytearray(1 << 30)),
    ],
)
def test_a_cell_reports_what_gets_out(outcome: str, trial: Callable[[Arena], object], arena: Arena) -> None:
    outcomes = run_in_a_cell({"it": lambda: str(trial(arena))}, arena.inside)
    assert outcomes["it"].startswith(outcome)


def hang() -> str:
    while True:
        pass


def test_a_cell_ends_what_hangs(arena: Arena) -> None:
    assert run_in_a_cell({"it": hang}, arena.inside, seconds=0.2)["it"].startswith("died")


# ---- every file, replaced


@pytest.mark.parametrize("file", FILES)
def test_nothing_is_run(file: str, arena: Arena) -> None:
    marker = arena.outside / "marker"
    payload = {name: make(marker) for name, make in payloads.RUNNING.items()}
    check_replaced(arena, file, {name: partial(put, data) for name, data in payload.items()}, NAMED)
    assert not marker.exists()


def put(data: bytes, path: Path) -> None:
    path.write_bytes(data)


@pytest.mark.parametrize("file", FILES)
def test_bytes_are_data_or_damage(file: str, arena: Arena) -> None:
    attacks = {name: partial(put, data) for name, data in payloads.BYTES.items()}
    check_replaced(arena, file, attacks, NAMED | WHOLE)


@pytest.mark.parametrize("file", FILES)
def test_what_is_not_a_regular_file_is_not_read(file: str, arena: Arena) -> None:
    attacks = {name: partial(place, arena.outside) for name, place in payloads.THINGS.items()}
    check_replaced(arena, file, attacks, NAMED)


@pytest.mark.parametrize("place", [payloads.pipe, payloads.directory, payloads.listener])
@pytest.mark.parametrize("file", FILES)
def test_what_is_not_a_regular_file_is_not_left_open(
    file: str, place: Callable[[Path, Path], None], arena: Arena
) -> None:
    store, before = arena.store(), os.listdir("/proc/self/fd")  # noqa: PTH208  # descriptors, not paths
    place(arena.outside, Path(store.directory) / "step-2" / file)
    with pytest.raises(DamagedCheckpointError, match=r"is not a regular file|cannot be opened"):
        store.verify("step-2")
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


@pytest.mark.parametrize("file", FILES)
def test_a_hard_link_is_a_file_like_any_other(file: str, arena: Arena) -> None:
    check_replaced(arena, file, {"it": partial(payloads.hard_link, arena.outside)}, NAMED | WHOLE)


# ---- signatures


@pytest.mark.parametrize("key", [None, b"", b"of an attacker"])
def test_right_hashes_do_not_stand_for_a_signature(key: bytes | None, arena: Arena) -> None:
    store = CheckpointStore(str(arena.inside / "signed"), KEY)
    signed = {save(store, 1).name: store.manifest("step-1").to_bytes(KEY)}
    path = Path(store.directory) / "step-1"
    (path / "shared.json").write_bytes(b"{}")
    reseal(path, key)
    with pytest.raises(CheckpointError, match="not signed with the key"):
        store.verify("step-1")
    there = json.loads((path / MANIFEST).read_bytes()) | {"hmac": json.loads(signed["step-1"])["hmac"]}
    (path / MANIFEST).write_bytes(to_json(there))
    with pytest.raises(CheckpointError, match="not signed with the key"):
        store.verify("step-1")


def test_a_key_without_a_byte_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="key is empty"):
        CheckpointStore(str(tmp_path), b"")


# ---- memory and time


def resealed_with(store: CheckpointStore, tree: object, tensors: bytes) -> CheckpointStore:
    """Put a state into the second checkpoint."""
    path = Path(store.directory) / "step-2"
    (path / "shared.json").write_text(json.dumps({"model": tree}))
    (path / "shared.safetensors").write_bytes(tensors)
    reseal(path)
    return store


@pytest.mark.parametrize("tag", ["array", "number"])
def test_a_small_file_does_not_grow_in_memory(tag: str, arena: Arena) -> None:
    """Two thousand states of the same 4 MiB are 8 GiB."""
    tensors = b"".join(safetensors_parts({"it": torch.zeros(1 << 22, dtype=torch.uint8)}))
    tree = [{"~": tag, "key": "it", "dtype": "|u1", "shape": [1 << 22]}] * 2000
    check(arena, {"it": partial(visit, resealed_with(arena.store(), tree, tensors))}, WHOLE)


def test_a_file_larger_than_the_memory_is_refused(arena: Arena) -> None:
    store = arena.store()
    os.truncate(Path(store.directory) / "step-2" / "shared.safetensors", ROOM + MAX_JSON_SIZE // 8)
    reseal(Path(store.directory) / "step-2")
    check(arena, {"it": partial(visit, store)}, {f"{REFUSED} {REFUSED} step-2"})


def test_json_that_takes_many_times_its_size_in_memory_is_not_read(arena: Arena) -> None:
    store = arena.store()
    os.truncate(Path(store.directory) / "step-2" / "shared.json", MAX_JSON_SIZE + 1)
    reseal(Path(store.directory) / "step-2")
    with pytest.raises(CheckpointError, match="but the limit is"):
        read_parts(store, store.manifest("step-2"), SHARED)


def test_no_json_is_written_that_would_not_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parts_module, "MAX_JSON_SIZE", 1000)
    with pytest.raises(CheckpointError, match=r"model, optimizer, .* store what is long in them"):
        save(CheckpointStore(str(tmp_path)), 1)


def test_a_disk_that_cannot_read_is_damage() -> None:
    with pytest.raises(DamagedCheckpointError, match="cannot be read: Input/output error"):
        FileSystem().read_at_most(f"/proc/{os.getpid()}/mem", 1)


# ---- directories


def linked(store: CheckpointStore, target: Path, name: str = "step-2") -> CheckpointStore:
    """Move a checkpoint elsewhere, and leave a link to it."""
    shutil.move(Path(store.directory) / name, target)
    (Path(store.directory) / name).symlink_to(target)
    return store


def test_a_checkpoint_that_is_a_link_is_not_followed(arena: Arena) -> None:
    stores = {"outside": linked(arena.store(), arena.outside / "step-2")}
    stores["inside"] = arena.store()
    linked(stores["inside"], Path(stores["inside"].directory) / "moved")
    check(arena, {name: partial(visit, store) for name, store in stores.items()}, FOUND_OUT)


@pytest.mark.parametrize("file", FILES)
def test_a_checkpoint_that_becomes_a_link_is_not_followed(file: str, arena: Arena) -> None:
    store = arena.store()
    manifest = store.verify("step-2")
    manifest = replace(manifest, files={**manifest.files, MANIFEST: FileDigest("0" * 64, 1)})
    linked(store, arena.outside / "step-2")
    with pytest.raises(DamagedCheckpointError, match="link"):
        store.read(manifest, file)


def test_what_is_removed_is_not_behind_a_link(arena: Arena) -> None:
    store = arena.store()
    linked(store, arena.outside / "step-2")
    (Path(store.directory) / ".partial-1").mkdir()
    (Path(store.directory) / ".partial-1" / "link").symlink_to(arena.outside)
    (Path(store.directory) / ".partial-2").symlink_to(arena.outside)
    before = contents(arena.outside)
    store.remove("step-2")
    assert store.clean_up() == [".partial-1"]
    assert contents(arena.outside) == before
    assert store.names() == ["step-1"]


@pytest.mark.parametrize("name", ["../outside", "..", ".", "", "/", "step-2/../step-1"])
def test_what_is_removed_is_a_checkpoint(name: str, arena: Arena) -> None:
    store = arena.store()
    before = contents(arena.path)
    with pytest.raises(CheckpointError, match="is not a valid"):
        store.remove(name)
    assert contents(arena.path) == before


def test_directories_in_each_other_are_removed(arena: Arena) -> None:
    store = arena.store()
    deep = Path(store.directory) / ".partial-1"
    for _ in range(200):
        deep.mkdir()
        deep /= "d"
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(
        len([*traceback.walk_stack(None)]) + 100
    )  # deeper directories than are usual are hard to be rid of
    try:
        assert store.clean_up() == [".partial-1"]
    finally:
        sys.setrecursionlimit(limit)


def test_odd_names_are_reported_in_printable_characters(arena: Arena) -> None:
    store = arena.store()
    for name in (b"step-\xff", b"step-\x1b[2J", b"step-\n", b"step-" + b"x" * 240, b"step- "):
        (Path(store.directory) / os.fsdecode(name)).mkdir()
        (Path(store.directory) / "step-2" / os.fsdecode(name)).mkdir()
    check(arena, {"it": partial(visit, store)}, {f"{DAMAGED} {READ} step-1"})
    assert {classify_outcome(partial(store.verify, name)) for name in store.names() if name != "step-1"} == {DAMAGED}


def test_a_name_is_taken_by_a_link_to_nothing(arena: Arena) -> None:
    store = arena.store()
    (Path(store.directory) / "step-3").symlink_to("nothing")
    with pytest.raises(CheckpointError, match="exists already"):
        store.begin("step-3")
