"""A run with checkpoints in an object store: after a kill or a failure at any request, it resumes to the last bit."""

import errno
import os
import random
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.registry import known_implementations
from safetensors.torch import load
from typing_extensions import override

from ptacc import Best, Callback, StepResult, Steps
from ptacc.checkpoint import manager
from ptacc.cli import main
from ptacc.errors import CheckpointError, DamagedCheckpointError, OptionError
from ptacc.files.paths import parse_path, split_path
from ptacc.files.remote_filesystem import RemoteFileSystem
from ptacc.storage.manifest import Manifest
from ptacc.storage.remote_store import RemoteStore, open_store
from ptacc.storage.store import CheckpointStore
from tests.checkpoint.objects import FOLDER, keys, object_at, observed_by
from tests.checkpoint.runs import STEPS, End, KillableTrainer, make, run_for_exit_code, save_each_step, train
from tests.ranks import RankFailed, launch, run_ranks

KILLED = 9
RUN = "objects://bucket/runs/digits"
BEST = "objects://bucket/best"
ELSEWHERE = f"{BEST}/third"
SCRIPT = Path(__file__).parent / "remote_script.py"


@pytest.fixture(autouse=True)
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of an empty store."""
    (tmp_path / "objects").mkdir()
    monkeypatch.setenv(FOLDER, str(tmp_path / "objects"))
    return tmp_path / "objects"


def save(directory: Path, url: str = RUN, **options: Any) -> End:
    """Train, and save each step; the history goes to a file in `directory`."""
    return save_each_step(directory, checkpoint_dir=url, filesystem=RemoteFileSystem(), **options)


def store(url: str = RUN) -> RemoteStore:
    found = open_store(parse_path(url))
    assert isinstance(found, RemoteStore)
    return found


def steps(url: str = RUN) -> list[int]:
    """Return the steps of the checkpoints, the newest first, and fail if one that is seen is torn."""
    found = list(store(url).verified())
    assert [(name, one) for name, one in found if not isinstance(one, Manifest)] == []
    return [one.step for _, one in found if isinstance(one, Manifest)]


def check_cleaned_up() -> None:
    there = {key.removeprefix("bucket/runs/digits/").partition("/")[0] for key in keys()}
    assert sorted(there) == store().names()


# ---- paths


def test_a_url_is_parsed_to_a_string() -> None:
    assert parse_path(RUN) == parse_path(f"{RUN}/") == RUN
    assert split_path(RUN) == ("objects://bucket/runs", "digits")
    with pytest.raises(OptionError, match="'objects://bucket' is a bucket or host: write objects://bucket/NAME"):
        split_path("objects://bucket")


def test_callbacks_get_a_url_as_a_string(tmp_path: Path) -> None:
    saved: list[str | Path] = []

    class Listens(Callback[KillableTrainer]):
        @override
        def on_save(self, trainer: KillableTrainer, path: str | Path) -> None:
            saved.append(path)

    trainer = make(tmp_path, checkpoint_dir=RUN, checkpoint_every=None, filesystem=RemoteFileSystem())
    trainer.callbacks = [Listens()]
    train(trainer)
    assert saved == [f"{RUN}/step-{STEPS:08}"]


def test_no_operation_on_a_remote_file_system_is_a_system_call() -> None:
    assert {*vars(RemoteFileSystem)} >= {"make_directory", "remove_file", "create", "replace_file", "sync_directory"}
    assert {*vars(RemoteFileSystem)} >= {"remove_directory", "get_kind", "list_directory", "open"}


def test_a_file_url_is_a_local_path(tmp_path: Path) -> None:
    assert parse_path(f"file://{tmp_path}") == parse_path(f"local://{tmp_path}") == str(tmp_path)
    assert parse_path("runs/x/") == parse_path(Path("runs/x")) == "runs/x"


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("simplecache::objects://bucket/x", "chains several URLs"),
        ("nowhere://bucket/x", "fsspec knows no protocol 'nowhere'"),
        ("objects://", "has no bucket or host: write objects://BUCKET/PATH"),
        ("objects:///x", "has no bucket or host"),
        ("objects://bucket//x", "contains an empty name"),
        ("objects://bucket/./x", "contains an empty name, '.'"),
        ("objects://bucket/../x", r"or '\.\.', which"),
        ("file://x", "write file:///PATH"),
        (Path("objects://bucket/x"), r"is a Path made from a URL. Give the string 'objects://bucket/x'"),
    ],
)
def test_an_invalid_url_is_refused(place: str | Path, said: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=said):
        parse_path(place)
    with pytest.raises(OptionError, match=rf"KillableTrainer\(checkpoint_dir=.*\): .*{said}"):
        make(tmp_path, checkpoint_dir=place)
    with pytest.raises(OptionError, match=rf"KillableTrainer\(resume=.*\): .*{said}"):
        make(tmp_path, resume=place)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = {"class": "absent_s3fs.FileSystem", "err": "Install absent_s3fs to access S3"}
    monkeypatch.setitem(known_implementations, "absent", missing)
    with pytest.raises(OptionError, match=r"Install absent_s3fs to access S3 \(No module named 'absent_s3fs'\)"):
        make(tmp_path, checkpoint_dir="absent://bucket/x")


def test_listings_are_not_cached(tmp_path: Path) -> None:
    filesystem = RemoteFileSystem()
    filesystem.write_file(f"{RUN}/one", [])
    assert filesystem.list_directory(RUN) == {"one": False}
    object_at(f"{RUN}/two").write_bytes(b"by another host")
    assert filesystem.list_directory(RUN) == {"one": False, "two": False}


def test_an_unreachable_file_does_not_pass_for_missing() -> None:
    def fail(request: str, path: str) -> None:
        raise ConnectionError("reset by peer")

    with observed_by(fail), pytest.raises(OSError, match=f"ConnectionError: reset by peer: '{RUN}'"):
        RemoteFileSystem().exists(RUN)


# ---- a run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> End:
    """Return what a run ends with that is saved to a disk."""
    return save_each_step(tmp_path_factory.mktemp("whole"))


class Interrupts(Callback[KillableTrainer]):
    """Ends the run after its second step."""

    @override
    def on_step_start(self, trainer: KillableTrainer) -> None:
        if trainer.progress.steps == 2:
            raise InterruptedError


@pytest.mark.parametrize("url", [RUN, "memory://runs/digits"])
@pytest.mark.parametrize("in_background", [False, True], ids=["foreground", "background"])
def test_a_run_resumes_as_if_it_had_not_been_interrupted(
    url: str, whole: End, tmp_path: Path, in_background: bool
) -> None:
    url = f"{url}-{in_background}"
    options: dict[str, Any] = {"filesystem": RemoteFileSystem(), "checkpoint_in_background": in_background}
    trainer = make(tmp_path, checkpoint_dir=url, checkpoint_every=Steps(2), **options)
    trainer.callbacks = [*trainer.callbacks, Interrupts()]
    with pytest.raises(InterruptedError):
        train(trainer)
    assert steps(url) == [2]
    assert save(tmp_path, url, resume=True, checkpoint_in_background=in_background).differences(whole) == []
    assert steps(url) == [STEPS, STEPS - 1, 2]
    assert sorted(RemoteFileSystem().list_directory(url)) == store(url).names()


def test_what_is_best_is_kept(tmp_path: Path) -> None:
    save(tmp_path, keep_best=Best("eval_loss", mode="max"))
    assert steps() == [STEPS, STEPS - 1, STEPS // 2]
    check_cleaned_up()


class SavesElsewhere(Callback[KillableTrainer]):
    """Has the run saved after its third step, and goes by the name of nothing that is saved."""

    @override
    def on_step_end(self, trainer: KillableTrainer, step: StepResult) -> None:
        if step.step == 3:
            assert trainer.save_checkpoint(ELSEWHERE) == ELSEWHERE


def test_a_run_on_a_disk_is_saved_elsewhere_and_resumed_from_there(whole: End, tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.callbacks = [*trainer.callbacks, SavesElsewhere()]
    train(trainer)
    assert RemoteFileSystem().is_directory(ELSEWHERE)
    assert store(BEST).custom_names() == ["third"]
    assert save(tmp_path, resume=ELSEWHERE).differences(whole) == []
    assert main(["verify", BEST]) == 0


def test_another_run_is_not_saved_to_the_same_place(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(CheckpointError, match="has checkpoints of another run"):
        save(tmp_path)


def test_a_bucket_that_is_not_there_is_named_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"FileNotFoundError: .*: 'objects://typo/"):
        save(tmp_path, "objects://typo/runs/x")
    assert keys() == []


def test_weights_are_loaded_and_exported(tmp_path: Path) -> None:
    weights = save(tmp_path).weights
    trainer = make(tmp_path / "other")
    trainer.load_checkpoint(RUN)
    trainer.export_model("objects://bucket/model.safetensors")
    exported = load(object_at("bucket/model.safetensors").read_bytes())
    assert all(torch.equal(exported[name], tensor) for name, tensor in weights.items())
    with pytest.raises(CheckpointError, match="exists already"):
        trainer.export_model("objects://bucket/model.safetensors")


def test_an_export_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.export_model("objects://bucket/model.safetensors")
    before = object_at("bucket/model.safetensors").read_bytes()
    for request in ("create", "write", "close"):
        with (
            observed_by(failing_in(request)),
            pytest.raises(CheckpointError, match=r"was not written: .*ConnectionError"),
        ):
            trainer.export_model("objects://bucket/model.safetensors", overwrite=True)
        assert [object_at(key).read_bytes() for key in keys()] == [before]


def failing_in(request: str) -> Callable[[str, str], None]:
    def fail(now: str, path: str) -> None:
        if now == request:
            raise ConnectionError("reset by peer")

    return fail


# ---- the command line


def test_the_command_line_takes_urls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path)
    assert main(["checkpoints", RUN]) == 0
    assert main(["verify", RUN]) == 0
    assert main(["verify", f"{RUN}/step-00000006"]) == 0
    assert main(["export", RUN, "objects://bucket/out.safetensors"]) == 0
    said = capsys.readouterr().out
    assert "step-00000005  intact\nstep-00000006  intact\n" in said
    assert "objects://bucket/out.safetensors: the weights of step-00000006" in said
    assert main(["checkpoints", "objects://bucket/nothing"]) == 1
    assert main(["export", RUN, "objects://bucket/out.safetensors"]) == 2


def test_the_command_line_names_what_is_wrong_with_a_url(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["verify", "nowhere://bucket/x"])
    assert "fsspec knows no protocol 'nowhere'" in capsys.readouterr().err
    with observed_by(failing_in("info")):
        assert main(["verify", RUN]) == 2
    assert f"ConnectionError: reset by peer: '{RUN}" in capsys.readouterr().err


# ---- the process ends before a request


@dataclass(frozen=True)
class Request:
    """A request of a run.

    Args:
        what: Its name, and what it is about.
        committed: Checkpoints that were there before it.
        is_opening: Whether it was made before the first step.
    """

    what: str
    committed: int
    is_opening: bool


class Watched:
    """The requests of a run, in their order."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._committed, self._is_opening = 0, True

    def record(self, request: str, path: str) -> None:
        kinds = ("manifest.json", ".partial-", ".removed-", ".lock", "step-")
        about = next((kind for kind in kinds if kind in path), "directory")
        self.requests.append(Request(f"{request} {about}", self._committed, self._is_opening))
        self._committed += (request, about) == ("close", "manifest.json")
        self._is_opening &= (request, about) != ("open", ".lock")


@pytest.fixture(params=[False, True], ids=["foreground", "background"])
def in_background(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def requests_of_a_run(directory: Path, **options: Any) -> list[Request]:
    """Return the requests that an uninterrupted run makes."""
    watched = Watched()
    with observed_by(watched.record):
        save(directory, **options)
    empty_bucket()
    return watched.requests


def empty_bucket() -> None:
    for key in keys():
        object_at(key).unlink()


def dying_at(number: int) -> Callable[[str, str], None]:
    seen = iter(range(number))

    def die(request: str, path: str) -> None:
        if next(seen, None) is None:
            os._exit(KILLED)

    return die


def save_and_die(directory: Path, number: int, **options: Any) -> None:
    with observed_by(dying_at(number)):
        save(directory, **options)


def kill_and_resume(directory: Path, number: int, committed: int, whole: End, **options: Any) -> None:
    assert run_for_exit_code(lambda: save_and_die(directory, number, **options)) == KILLED
    assert (steps() or [0])[0] == committed
    assert save(directory, resume=True, **options).differences(whole) == []
    assert steps()[:2] == [STEPS, STEPS - 1]
    check_cleaned_up()
    empty_bucket()
    shutil.rmtree(directory)


def one_of_each_kind(requests: list[Request]) -> Iterator[int]:
    """Iterate over the numbers of requests, one of each kind, from all parts of the run."""
    for place, what in enumerate(sorted({request.what for request in requests})):
        there = [number for number, request in enumerate(requests) if request.what == what]
        yield there[place * 7 % len(there)]


def kill_at_each(numbers: Iterable[int], requests: list[Request], whole: End, directory: Path, **how: Any) -> None:
    for number in numbers:
        kill_and_resume(directory / f"{number}", number, requests[number].committed, whole, **how)


def test_a_run_killed_before_a_request_of_every_other_kind_resumes(
    whole: End, tmp_path: Path, in_background: bool
) -> None:
    requests = requests_of_a_run(tmp_path / "requests", checkpoint_in_background=in_background)
    numbers = list(one_of_each_kind(requests))
    assert len(numbers) >= 20
    kill_at_each(numbers[in_background::2], requests, whole, tmp_path, checkpoint_in_background=in_background)


@pytest.mark.prove
@pytest.mark.timeout(1800)
def test_a_run_killed_before_any_request_resumes(whole: End, tmp_path: Path, in_background: bool) -> None:
    requests = requests_of_a_run(tmp_path / "requests", checkpoint_in_background=in_background)
    assert len(requests) >= 300
    kill_at_each(range(len(requests)), requests, whole, tmp_path, checkpoint_in_background=in_background)


# ---- marks


@pytest.fixture
def three(tmp_path: Path) -> RemoteStore:
    """Return a store of three checkpoints: of steps 2, 4 and 6."""
    train(make(tmp_path / "three", checkpoint_dir=RUN, filesystem=RemoteFileSystem(), checkpoint_every=Steps(2)))
    return store()


def mark(kind: str, name: str) -> None:
    object_at(f"{RUN}/{kind}{name}").write_bytes(b"")


def test_what_has_a_mark_and_no_manifest_is_removed(three: RemoteStore) -> None:
    mark(".partial-", "step-00000004")
    object_at(f"{RUN}/step-00000004/manifest.json").unlink()
    assert steps() == [6, 2]
    assert three.clean_up() == [".partial-step-00000004"]
    assert not three.filesystem.exists(three.locate("step-00000004"))
    check_cleaned_up()


def test_what_has_a_mark_and_a_manifest_is_a_checkpoint(three: RemoteStore) -> None:
    mark(".partial-", "step-00000006")
    assert steps() == [6, 4, 2]
    assert three.clean_up() == [".partial-step-00000006"]
    assert steps() == [6, 4, 2]


def test_what_has_the_mark_of_another_key_is_not_removed(three: RemoteStore) -> None:
    mark(".partial-", "step-00000006")
    replace(three, key=b"another").clean_up()
    assert steps() == [6, 4, 2]


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden"])
@pytest.mark.parametrize("kind", [".partial-", ".removed-"])
def test_a_mark_of_no_checkpoint_marks_nothing(three: RemoteStore, kind: str, name: str) -> None:
    mark(kind, name)
    assert three.clean_up() == []
    assert steps() == [6, 4, 2]


def test_what_is_being_removed_is_not_a_checkpoint(three: RemoteStore) -> None:
    mark(".removed-", "step-00000006")
    assert steps() == [4, 2]
    assert three.clean_up() == [".removed-step-00000006"]
    assert not three.filesystem.exists(three.locate("step-00000006"))


def test_what_has_lost_its_manifest_is_reported_and_never_removed(
    three: RemoteStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    object_at(f"{RUN}/step-00000006/manifest.json").unlink()
    assert three.clean_up() == []
    assert main(["checkpoints", RUN]) == 1
    assert "step-00000006     -      -" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="step-00000006 is skipped: 'step-00000006' in .* has no manifest"):
        train(
            make(
                tmp_path / "three",
                checkpoint_dir=RUN,
                filesystem=RemoteFileSystem(),
                checkpoint_every=None,
                resume=True,
            )
        )
    assert three.filesystem.exists(three.locate("step-00000006", "shared.json"))


def test_a_name_whose_save_did_not_end_is_free_again(three: RemoteStore) -> None:
    manifest = three.manifest("step-00000006")
    pending = three.begin("mine")
    three.write(pending, "left", [b"behind"])
    assert three.custom_names() == []
    pending = three.begin("mine")
    assert not three.filesystem.exists(f"{pending.path}/left")
    three.commit(pending, replace(manifest, files={"new": three.write(pending, "new", [b"file"])}))
    assert three.verify("mine").sequence == 4
    with pytest.raises(CheckpointError, match="mine exists already"):
        three.begin("mine")


def test_a_save_whose_mark_stays_is_a_save(three: RemoteStore) -> None:
    def fail(request: str, path: str) -> None:
        if request == "rm_file":
            raise ConnectionError("reset by peer")

    manifest = three.manifest("step-00000006")
    pending = three.begin("step-00000008")
    with observed_by(fail):
        three.commit(pending, replace(manifest, step=8, files={"file": three.write(pending, "file", [b"it"])}))
    assert steps() == [8, 6, 4, 2]


# ---- damage


def test_flipped_bits_and_missing_files_are_found(three: RemoteStore) -> None:
    chance = random.Random(0)
    for key in [key for key in keys() if "step-00000006/" in key]:
        data = object_at(key).read_bytes()
        for _ in range(5):
            bit = chance.randrange(8 * len(data))
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            object_at(key).write_bytes(damaged)
            check_passed_over(three)
        object_at(key).write_bytes(data[:-1])
        check_passed_over(three)
        object_at(key).unlink()
        check_passed_over(three)
        object_at(key).write_bytes(data)
    assert steps() == [6, 4, 2]


def check_passed_over(store: CheckpointStore) -> None:
    found, passed_over = store.newest()
    assert found is not None
    assert found.step == 4
    assert [*passed_over] == ["step-00000006"]
    assert isinstance(passed_over["step-00000006"], DamagedCheckpointError)


# ---- the store fails


class HttpError(Exception):
    """An error of a client library, which is no `OSError`."""


ERRORS = (
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    PermissionError("403 Forbidden"),
    ConnectionError("reset by peer"),
    TimeoutError("no answer"),
    HttpError("503 Slow Down"),
)


class Failing:
    """A store of which a request fails, and all later ones if that is lasting."""

    def __init__(self, at: int, error: Exception, *, lasting: bool) -> None:
        self.at, self.error, self.lasting = at, error, lasting
        self.number = self.committed = 0
        self.failed: list[str] = []

    def fail(self, request: str, path: str) -> None:
        number, self.number = self.number, self.number + 1
        if number == self.at or (self.lasting and number > self.at):
            self.failed.append(f"{request} {path}")
            raise self.error
        self.committed += request == "close" and path.endswith("manifest.json")


def outcome(directory: Path, **options: Any) -> tuple[End | CheckpointError, str]:
    """Train, and return the result or the error, and the text of all errors and warnings."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            ended: End | CheckpointError = save(directory, **options)
        except CheckpointError as error:
            ended = error
    return ended, "\n".join([str(ended) * isinstance(ended, CheckpointError), *(str(one.message) for one in warned)])


def fail_and_check(directory: Path, failing: Failing, request: Request, whole: End, **options: Any) -> None:
    """Let a run save itself to a store that fails, and check all that has to be so then."""
    with observed_by(failing.fail):
        ended, messages = outcome(directory, **options)
    on_error = options["checkpoint_errors"]
    assert (steps() or [0])[0] >= failing.committed
    if isinstance(ended, CheckpointError):
        assert on_error == "raise" or request.is_opening
    else:
        assert ended.differences(whole) == []
    # A mark that stays after its save is ignored, and removed later. So is a lock that stays after its run.
    is_lock_of_ended_run = failing.committed == STEPS and failing.failed[0].endswith("/.lock")
    is_leftover = failing.failed[0].startswith("rm_file bucket/runs/digits/.partial-") or is_lock_of_ended_run
    if (failing.lasting and not is_lock_of_ended_run) or not is_leftover:
        said = failing.error.strerror if isinstance(failing.error, OSError) and failing.error.errno else None
        assert (said or f"{type(failing.error).__name__}: {failing.error}") in messages
        assert RUN in messages
    assert save(directory, resume=True, **options).differences(whole) == []
    check_cleaned_up()
    empty_bucket()
    shutil.rmtree(directory)


WAYS = [(on_error, lasting) for on_error in ("raise", "warn") for lasting in (False, True)]


@pytest.mark.parametrize(("on_error", "lasting"), WAYS)
def test_a_store_that_fails_keeps_what_was_saved_and_is_named(
    whole: End, tmp_path: Path, in_background: bool, on_error: str, lasting: bool
) -> None:
    options = {"checkpoint_in_background": in_background, "checkpoint_errors": on_error}
    requests = requests_of_a_run(tmp_path / "requests", **options)
    start = 2 * WAYS.index((on_error, lasting)) + in_background
    for number in [*one_of_each_kind(requests)][start::8]:
        failing = Failing(number, ERRORS[number % 5], lasting=lasting)
        fail_and_check(tmp_path / f"{number}", failing, requests[number], whole, **options)


@pytest.mark.prove
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("on_error", "lasting"), WAYS)
def test_a_store_that_fails_at_any_request_keeps_what_was_saved_and_is_named(
    whole: End, tmp_path: Path, in_background: bool, on_error: str, lasting: bool
) -> None:
    options = {"checkpoint_in_background": in_background, "checkpoint_errors": on_error}
    requests = requests_of_a_run(tmp_path / "requests", **options)
    start = (WAYS.index((on_error, lasting)) + in_background) % 2
    for number in range(start, len(requests), 2):
        failing = Failing(number, ERRORS[number % 5], lasting=lasting)
        fail_and_check(tmp_path / f"{number}", failing, requests[number], whole, **options)


def test_a_run_that_resumes_never_skips_an_unreachable_checkpoint(tmp_path: Path) -> None:
    save(tmp_path)
    watched = Watched()
    with observed_by(watched.record):
        save(tmp_path, resume=True)
    opening = [number for number, request in enumerate(watched.requests) if request.is_opening]
    assert len(opening) >= 20
    for number in opening:
        failing = Failing(number, ERRORS[number % 5], lasting=False)
        with observed_by(failing.fail):
            ended, _ = outcome(tmp_path, resume=True)
        assert isinstance(ended, CheckpointError), (number, failing.failed)
        assert split_path(RUN)[0] in str(ended)
        assert steps() == [STEPS, STEPS - 1]


# ---- two processes


def save_as_one_of_two(directory: Path, url: str = RUN, *, dies: tuple[int, int] = (-1, 0)) -> End:
    """Train as one of two processes, of which one `dies` before a request: its rank, and the request's number."""
    rank, number = dies
    with observed_by(dying_at(number) if str(rank) == os.environ["RANK"] else _nothing):
        return save(directory, url, resume=True)


def _nothing(request: str, path: str) -> None:
    """Let everything be done."""


def die_in_a_save_and_resume(directory: Path, rank: int, number: int, both: list[End]) -> None:
    try:
        run_ranks(lambda: save_as_one_of_two(directory, dies=(rank, number)), 2)
    except RankFailed:
        assert len(steps()) <= 3  # the two that are kept, and one that is not removed yet
    else:
        pytest.fail("no process died")
    ends = run_ranks(save_as_one_of_two, 2, directory)
    assert [end.differences(whole) for end, whole in zip(ends, both, strict=True)] == [[], []]
    check_cleaned_up()
    empty_bucket()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[End]:
    """Return what an uninterrupted run of two processes ends with on each, saved to a disk."""
    directory = tmp_path_factory.mktemp("both")
    return run_ranks(lambda: save_each_step(directory), 2)


def test_two_processes_save_one_checkpoint(both: list[End], tmp_path: Path) -> None:
    ends = run_ranks(save_as_one_of_two, 2, tmp_path)
    assert [end.differences(whole) for end, whole in zip(ends, both, strict=True)] == [[], []]
    assert steps() == [STEPS, STEPS - 1]
    assert {manifest.world_size for manifest in store().manifests()} == {2}
    check_cleaned_up()


@pytest.mark.parametrize(
    ("rank", "number"),
    [
        (0, 60),
        (1, 9),
        *(
            pytest.param(rank, number, marks=pytest.mark.prove)
            for rank, numbers in ((0, range(5, 200, 13)), (1, range(1, 30, 3)))
            for number in numbers
        ),
    ],
)
def test_two_processes_one_of_which_is_killed_resume(both: list[End], tmp_path: Path, rank: int, number: int) -> None:
    die_in_a_save_and_resume(tmp_path, rank, number, both)


def test_processes_that_do_not_share_the_store_get_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "SEEN_WITHIN_SECONDS", 0.2)

    def start() -> str:
        with pytest.raises(CheckpointError) as caught:
            save_as_one_of_two(tmp_path, "memory://runs/apart")
        return str(caught.value)

    assert all("memory://runs/apart is not one directory for all processes" in text for text in run_ranks(start, 2))


def test_torchrun_saves_and_resumes(bucket: Path, tmp_path: Path) -> None:
    for epochs in (1, 2):
        command = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
        done = launch([*command, str(SCRIPT), RUN, str(epochs)], {FOLDER: str(bucket), "ACCELERATE_USE_CPU": "true"})
        assert done.returncode == 0, done.stderr
    assert steps() == [STEPS, STEPS // 2]
    check_cleaned_up()
