"""A checkpoint is there whole or not at all, whatever happens while it is written, and damage is named."""

import errno
import inspect
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import override

from ptacc.checkpoint.export import write_weights
from ptacc.errors import CheckpointError, DamagedCheckpointError
from ptacc.files.filesystem import FileSystem
from ptacc.serialization.json_codec import Encoded, decode, encode
from ptacc.serialization.safetensors_file import parse_safetensors, safetensors_parts
from ptacc.storage.lock import DirectoryLock
from ptacc.storage.manifest import Manifest
from ptacc.storage.store import CheckpointStore
from tests.checkpoint.faults.disks import CALLS, Interposed, Losing, dying_at, failing_at

WEIGHTS = torch.arange(6.0).reshape(2, 3)
STEPS = {1: "one", 2: float("inf")}


def save(store: CheckpointStore, step: int) -> Manifest:
    pending = store.begin(f"step-{step:010}")
    encoded = encode({"weights": WEIGHTS + step, "steps": STEPS, "step": step})
    files = {
        "state.json": store.write(pending, "state.json", [json.dumps(encoded.tree).encode()]),
        "state.safetensors": store.write(pending, "state.safetensors", safetensors_parts(encoded.tensors)),
    }
    here = Manifest("", "a run", step=step, epoch=1, offset=2, world_size=1, files=files, metrics={"loss": 0.5})
    return store.commit(pending, here)


def load(store: CheckpointStore, manifest: Manifest) -> int:
    tree = json.loads(store.read(manifest, "state.json"))
    tensors = parse_safetensors(store.read(manifest, "state.safetensors"), "state.safetensors")
    state = decode(Encoded(tree, tensors))
    assert torch.equal(state["weights"], WEIGHTS + state["step"])
    assert state["steps"] == STEPS
    return int(state["step"])


def newest_step(directory: Path) -> int | None:
    """Return the step of the newest checkpoint that is whole, having loaded it; 0 for none."""
    store = CheckpointStore(str(directory))
    manifest, _ = store.newest()
    return 0 if manifest is None else load(store, manifest)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path / "runs" / "digits"))
    saved = save(store, 500)
    assert load(store, store.manifest(saved.name)) == 500
    assert store.verify(saved.name) == saved
    assert store.names() == ["step-0000000500"]


def test_no_checkpoint_is_written_over(tmp_path: Path) -> None:
    save(CheckpointStore(str(tmp_path)), 1)
    with pytest.raises(CheckpointError, match="exists already"):
        save(CheckpointStore(str(tmp_path)), 1)


def test_a_step_that_is_saved_again_gets_a_numbered_name(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    names = ["step-00000007", "step-00000007.01", "step-00000007.02"]
    for name in names:
        assert store.free_name(7) == name
        (tmp_path / name).mkdir()


def test_other_users_can_read_what_is_saved(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    save(store, 1)
    with DirectoryLock(store).held():
        modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    umask = os.umask(0o077)
    os.umask(umask)
    assert modes == {0o644 & ~umask}


@pytest.mark.parametrize("name", ["", "..", "../up", "a/b", ".hidden", "/root", "a\0b", "new\nline"])
def test_a_name_leads_nowhere_else(name: str, tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    with pytest.raises(CheckpointError, match="is not a valid"):
        store.begin(name)
    pending = store.begin("right")
    with pytest.raises(CheckpointError, match="is not a valid"):
        store.write(pending, name, [b""])


# ---- the process ends, the power goes, the disk fails


def record_calls(do: Callable[[CheckpointStore], object], directory: Path) -> list[str]:
    """Return the names of the system calls that something makes."""
    names: list[str] = []
    disk = Interposed(lambda number, name, arguments: names.append(name))
    do(CheckpointStore(str(directory), filesystem=disk))
    return names


def calls_of_a_save(directory: Path) -> list[str]:
    """Return the calls of a save in a directory with another checkpoint."""
    save(CheckpointStore(str(directory)), 1)
    return record_calls(lambda store: save(store, 2), directory)


def run_for_exit_code(do: Callable[[], object]) -> int:
    """Do something in a process of its own."""
    child = os.fork()
    if child == 0:
        do()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_process_that_ends_anywhere_in_a_save_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    calls = calls_of_a_save(tmp_path / "count")
    for number in range(len(calls)):
        directory = tmp_path / f"{number}"
        save(CheckpointStore(str(directory)), 1)
        assert run_for_exit_code(lambda: save(CheckpointStore(str(directory), filesystem=dying_at(number)), 2)) == 9  # noqa: B023
        renamed = "rename" in calls[:number]
        assert newest_step(directory) == (2 if renamed else 1)
        left = CheckpointStore(str(directory)).clean_up()
        assert len(left) == (0 if renamed or number < 1 + calls.index("make_directory") else 1)
        assert save(CheckpointStore(str(directory)), 3).step == 3


def test_a_process_that_ends_in_a_removal_leaves_nothing_in_part(tmp_path: Path) -> None:
    save(CheckpointStore(str(tmp_path / "count")), 1)
    calls = record_calls(lambda store: store.remove("step-0000000001"), tmp_path / "count")
    for number in range(len(calls)):
        directory = tmp_path / f"{number}"
        save(CheckpointStore(str(directory)), 1)
        store = CheckpointStore(str(directory), filesystem=dying_at(number))
        assert run_for_exit_code(lambda: store.remove("step-0000000001")) == 9  # noqa: B023
        assert newest_step(directory) == (1 if number == 0 else 0)
        CheckpointStore(str(directory)).clean_up()
        assert [*directory.iterdir()] == ([directory / "step-0000000001"] if number == 0 else [])


class Recording(Losing):
    """Leaves, after each call, what a loss of power would leave."""

    def leave_all(self, target: Path) -> "Recording":
        self.target, self.number = target, 0
        target.mkdir()
        return self


def _then_leave(name: str) -> Callable[..., object]:
    def call(self: Recording, *arguments: object) -> object:
        result = getattr(super(Recording, self), name)(*arguments)
        self.leave(self.target / f"{self.number:03}")
        self.number += 1
        return result

    return call


for _name in CALLS:
    setattr(Recording, _name, _then_leave(_name))


def test_a_loss_of_power_anywhere_in_a_save_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    save(CheckpointStore(str(tmp_path / "disk")), 1)
    disk = Recording(tmp_path / "disk").leave_all(tmp_path / "left")
    save(CheckpointStore(str(tmp_path / "disk"), filesystem=disk), 2)
    left = sorted((tmp_path / "left").iterdir())
    steps = [newest_step(directory) for directory in left]
    assert steps == sorted(steps, key=lambda step: step or 0)
    assert set(steps) == {1, 2}
    assert steps[-1] == 2


def record_syncs(do: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Return what was synced and renamed, at the functions of `os`: (what, the name of the file or directory)."""
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def record_sync(descriptor: int) -> None:
        fsync(descriptor)
        events.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name.split("-")[0]))

    def record_rename(source: str, target: str) -> None:
        rename(source, target)
        events.append(("rename", Path(target).name))

    with monkeypatch.context() as patches:
        patches.setattr(os, "fsync", record_sync)
        patches.setattr(os, "rename", record_rename)
        do()
    return events


def test_files_are_synced_by_the_system_before_the_rename_and_directories_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(str(tmp_path / "runs"))
    store.prepare()
    files = [("sync", name) for name in ("state.json", "state.safetensors", "manifest.json")]
    around = [("sync", ".partial"), ("rename", "step-0000000001"), ("sync", "runs")]
    assert record_syncs(lambda: save(store, 1), monkeypatch) == [*files, *around]


def test_an_exported_file_is_synced_by_the_system_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export() -> None:
        write_weights(FileSystem(), str(tmp_path / "weights"), {"weight": WEIGHTS})

    expected = [("sync", ".partial"), ("rename", "weights"), ("sync", tmp_path.name.split("-")[0])]
    assert record_syncs(export, monkeypatch) == expected


def test_new_directories_are_synced_by_the_system_from_the_top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(str(tmp_path / "a" / "b"))
    synced = record_syncs(store.prepare, monkeypatch)
    assert synced[-2:] == [("sync", tmp_path.name.split("-")[0]), ("sync", "a")]


def test_a_directory_that_a_killed_process_made_is_made_durable(tmp_path: Path) -> None:
    disk = Losing(tmp_path)
    disk.make_directory(str(tmp_path / "runs"))
    CheckpointStore(str(tmp_path / "runs"), filesystem=disk).prepare()
    assert [*disk.tree.durable] == ["runs"]


def test_a_directory_in_one_that_cannot_be_read_is_taken_as_it_is(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), filesystem=failing_at(0, errno.EACCES, frozenset({"open_directory"})))
    store.prepare()
    save(store, 1)
    assert newest_step(tmp_path) == 1


def test_a_directory_that_cannot_be_listed_is_named(two: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "scandir", fail)
    for look in (two.names, two.clean_up, two.custom_names):
        with pytest.raises(CheckpointError, match=f"{two.directory}: .*Input/output error"):
            look()


def test_the_test_of_power_loss_finds_a_disk_that_does_not_sync(tmp_path: Path) -> None:
    class Forgetful(Recording):
        @override
        def sync(self, descriptor: int) -> None:
            """Sync directories alone."""
            if descriptor in self.opened and not hasattr(self.opened[descriptor], "written"):
                super().sync(descriptor)

    (tmp_path / "disk").mkdir()
    save(
        CheckpointStore(str(tmp_path / "disk"), filesystem=Forgetful(tmp_path / "disk").leave_all(tmp_path / "left")), 1
    )
    assert newest_step(tmp_path / "disk") == 1
    assert newest_step(max((tmp_path / "left").iterdir())) == 0


WRITING = frozenset({"open_new", "write", "sync", "rename", "make_directory", "open_directory"})


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_fails_anywhere_leaves_the_old(error: int, tmp_path: Path) -> None:
    calls = [name for name in calls_of_a_save(tmp_path / "count") if name in WRITING]
    for number in range(len(calls)):
        directory = tmp_path / f"{number}"
        save(CheckpointStore(str(directory)), 1)
        store = CheckpointStore(str(directory), filesystem=failing_at(number, error, WRITING))
        with pytest.raises(OSError, match=os.strerror(error)):
            save(store, 2)
        assert newest_step(directory) == (2 if "rename" in calls[:number] else 1)


# ---- damage


@pytest.fixture
def two(tmp_path: Path) -> CheckpointStore:
    """Return a store of two checkpoints."""
    store = CheckpointStore(str(tmp_path / "two"))
    save(store, 1)
    save(store, 2)
    return store


def list_files(store: CheckpointStore, name: str) -> list[Path]:
    return sorted((Path(store.directory) / name).iterdir())


def check_passed_over(store: CheckpointStore) -> None:
    """Check that the second checkpoint is named as damaged, and the first found instead."""
    found, passed_over = store.newest()
    assert found is not None
    assert load(store, found) == 1
    assert list(passed_over) == ["step-0000000002"]
    assert isinstance(passed_over["step-0000000002"], DamagedCheckpointError)


def flip_and_check(store: CheckpointStore, chance: random.Random) -> None:
    path = chance.choice(list_files(store, "step-0000000002"))
    whole = path.read_bytes()
    bit = chance.randrange(8 * len(whole))
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    check_passed_over(store)
    path.write_bytes(whole)


def truncate_and_check(store: CheckpointStore, chance: random.Random) -> None:
    path = chance.choice(list_files(store, "step-0000000002"))
    whole = path.read_bytes()
    path.write_bytes(whole[: chance.randrange(len(whole))])
    check_passed_over(store)
    path.write_bytes(whole)


def test_flipped_bits_and_truncations_are_found(two: CheckpointStore) -> None:
    chance = random.Random(0)
    for _ in range(60):
        flip_and_check(two, chance)
        truncate_and_check(two, chance)


@pytest.mark.prove
def test_a_thousand_flipped_bits_and_two_hundred_truncations_are_found(two: CheckpointStore) -> None:
    chance = random.Random(1)
    for _ in range(1000):
        flip_and_check(two, chance)
    for _ in range(200):
        truncate_and_check(two, chance)


def test_every_bit_of_a_manifest_counts(two: CheckpointStore) -> None:
    path = Path(two.directory) / "step-0000000002" / "manifest.json"
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CheckpointError):
            Manifest.from_bytes(bytes(damaged))


@pytest.mark.parametrize("index", range(3))
def test_a_missing_file_is_found(index: int, two: CheckpointStore) -> None:
    list_files(two, "step-0000000002")[index].unlink()
    check_passed_over(two)


@pytest.mark.parametrize("index", range(3))
def test_a_file_of_another_checkpoint_is_found(index: int, two: CheckpointStore) -> None:
    first, second = (list_files(two, f"step-000000000{step}")[index] for step in (1, 2))
    second.write_bytes(first.read_bytes())
    check_passed_over(two)


def test_a_file_too_many_is_found(two: CheckpointStore) -> None:
    (Path(two.directory) / "step-0000000002" / "extra.pkl").write_bytes(b"cos\nsystem\n")
    check_passed_over(two)


def test_a_file_that_is_not_in_the_manifest_is_not_read(two: CheckpointStore) -> None:
    manifest = two.manifest(two.names()[0])
    (Path(two.directory) / manifest.name / "more.json").write_text("{}")
    with pytest.raises(DamagedCheckpointError, match=r"more\.json is not in the manifest"):
        two.read(manifest, "more.json")


def test_a_link_is_not_followed(two: CheckpointStore, tmp_path: Path) -> None:
    path = list_files(two, "step-0000000002")[-1]
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    check_passed_over(two)


def test_a_renamed_checkpoint_is_found(two: CheckpointStore) -> None:
    (Path(two.directory) / "step-0000000001").rename(Path(two.directory) / "step-0000000003")
    found, passed_over = two.newest()
    assert found is not None
    assert found.step == 2
    assert "its directory was renamed" in str(passed_over["step-0000000003"])


# ---- signatures


@pytest.mark.parametrize("value", [2**63, -(2**63), True, "0.5"])
def test_a_metric_that_is_not_a_number_of_64_bits_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="a metric is not a number"):
        Manifest("one", "a run", step=1, epoch=0, offset=0, world_size=1, metrics={"loss": value}).check()


def test_a_signature_tells_who_wrote_it(tmp_path: Path) -> None:
    save(CheckpointStore(str(tmp_path), key=b"ours"), 1)
    assert CheckpointStore(str(tmp_path), key=b"ours").verify("step-0000000001").step == 1
    assert CheckpointStore(str(tmp_path)).verify("step-0000000001").step == 1
    with pytest.raises(CheckpointError, match="not signed with the key"):
        CheckpointStore(str(tmp_path), key=b"theirs").verify("step-0000000001")


def test_an_unsigned_checkpoint_is_refused_where_there_is_a_key(tmp_path: Path) -> None:
    save(CheckpointStore(str(tmp_path)), 1)
    with pytest.raises(CheckpointError, match="not signed with the key"):
        CheckpointStore(str(tmp_path), key=b"ours").verify("step-0000000001")


OPERATIONS = {
    *("create", "write_file", "replace_file", "sync_directory", "remove_tree", "get_kind", "exists", "is_directory"),
    *("list_directory", "open", "read_file", "hash_file", "check_size", "read_at_most", "_open_checked", "_synced"),
}
"""What is made of the system calls, and what only reads."""


def test_every_system_call_that_writes_can_be_replaced() -> None:
    methods = {name for name, value in vars(FileSystem).items() if inspect.isfunction(value)}
    assert methods == {*CALLS, *OPERATIONS}
