"""When a run is saved, which checkpoints are kept, how a run resumes, and what is refused."""

import math
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import IterableDataset
from typing_extensions import override

from ptacc import (
    Best,
    Callback,
    CheckpointMixin,
    EarlyStoppingMixin,
    EMAMixin,
    Epochs,
    GradAccumMixin,
    Minutes,
    Mixin,
    RestoreBestWeights,
    SaveBest,
    SeedMixin,
    StateKey,
    StepOutput,
    StepResult,
    Steps,
    Trainer,
    TrainerCore,
)
from ptacc.checkpoint import manager
from ptacc.errors import (
    CheckpointError,
    CollectiveError,
    DamagedCheckpointError,
    MonitorError,
    NestedRunError,
    OptionError,
    RankFailedError,
)
from ptacc.files.filesystem import FileSystem
from ptacc.mixins.checkpoint import SAVER
from ptacc.storage.remote_store import open_store
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import run_ranks
from tests.records import read_lines


class Saving(CheckpointMixin, SeedMixin, Trainer):
    seed: int | None = 5


class Noting(Callback[TrainerCore]):
    """Records what was saved and loaded, and when."""

    def __init__(self) -> None:
        self.saved: list[tuple[int, str]] = []
        self.loaded: list[str] = []

    @override
    def on_save(self, trainer: TrainerCore, path: str | Path) -> None:
        self.saved.append((trainer.progress.steps, Path(path).name))

    @override
    def on_load(self, trainer: TrainerCore, path: str | Path) -> None:
        self.loaded.append(Path(path).name)


class At(Callback[CheckpointMixin]):
    """Calls a function at the end of a step."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    @override
    def on_step_end(self, trainer: CheckpointMixin, step: StepResult) -> None:
        if step.step == self.step:
            self.act(trainer)


def names(directory: Path) -> list[int]:
    """Return the steps of the checkpoints in a directory, all of them intact."""
    store = open_store(directory)
    return [store.verify(name).step for name in store.names()]


def train(directory: Path, kind: type[Saving] = Saving, /, *, data: Any = None, **options: Any) -> Saving:
    """Train two epochs of three steps."""
    parts: dict[str, Any] = {**tiny_parts(), "checkpoint_dir": directory, **options}
    how: Any = {name: parts.pop(name) for name in ("num_epochs", "max_steps", "evaluate_every") if name in parts}
    trainer = kind(**parts)
    how = {"num_epochs": 2} | how
    trainer.train(data or tiny_data(), tiny_data(8), per_device_batch_size=8, **how)
    return trainer


def weights(trainer: TrainerCore) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in trainer.unwrapped_model.state_dict().values()])


# ---- when a run is saved


@pytest.mark.parametrize(
    ("every", "steps"),
    [(None, [6]), (Epochs(1), [3, 6]), (Steps(2), [2, 4, 6]), (Steps(4), [4, 6]), (Minutes(1e-9), [1, 2, 3, 4, 5, 6])],
)
@pytest.mark.parametrize("background", [False, True])
def test_a_run_is_saved_at_each_interval_and_at_its_end(
    tmp_path: Path, every: Any, steps: list[int], background: bool
) -> None:
    noting = Noting()
    train(tmp_path, checkpoint_every=every, checkpoint_in_background=background, callbacks=[noting])
    assert names(tmp_path) == steps
    assert [name for _, name in noting.saved] == [f"step-{step:08}" for step in steps]


def test_a_checkpoint_at_the_end_of_an_epoch_includes_its_evaluation(tmp_path: Path) -> None:
    trainer = train(tmp_path, checkpoint_every=Steps(3))
    manifests = open_store(tmp_path).manifests()
    assert [manifest.metrics["eval_loss"] for manifest in manifests] == [epoch.eval_loss for epoch in trainer.history]
    assert [(manifest.epoch, manifest.offset) for manifest in manifests] == [(1, 0), (2, 0)]


@pytest.mark.parametrize("cut", [True, False])
def test_old_checkpoints_are_kept_if_the_newest_is_not_all_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    rename = FileSystem.rename

    def losing(self: FileSystem, source: str, target: str) -> None:
        rename(self, source, target)
        if target.endswith("step-00000006"):
            file = next(Path(target).glob("*.safetensors"))
            if cut:
                file.write_bytes(file.read_bytes()[:-1])
            else:
                file.unlink()

    monkeypatch.setattr(FileSystem, "rename", losing)
    with pytest.warns(UserWarning, match="old checkpoints were not removed: .*step-00000006"):
        train(tmp_path, checkpoint_every=Steps(2), keep_last=1)
    newest, _ = open_store(tmp_path).newest()
    assert newest is not None
    assert newest.step == 4


def test_a_manifest_has_only_values_of_the_weights_it_was_saved_with(tmp_path: Path) -> None:
    train(tmp_path, checkpoint_every=Steps(1), evaluate_every=Steps(2))
    evaluated = [manifest.step for manifest in open_store(tmp_path).manifests() if "eval_loss" in manifest.metrics]
    assert evaluated == [2, 4, 6]


def test_save_checkpoint_requests_a_checkpoint(tmp_path: Path) -> None:
    asked: list[str] = []
    elsewhere = tmp_path / "mine" / "good"
    callbacks = [
        At(2, lambda trainer: asked.append(trainer.save_checkpoint(label="mine"))),
        At(4, lambda trainer: asked.append(trainer.save_checkpoint(elsewhere))),
    ]
    train(tmp_path / "run", checkpoint_every=None, callbacks=callbacks, keep_last=1)
    assert asked == [str(tmp_path / "run" / "step-00000002"), str(elsewhere)]
    assert names(tmp_path / "run") == [2, 6]
    assert open_store(elsewhere.parent).verify("good").step == 4
    again = train(tmp_path / "again", resume=elsewhere)
    assert torch.equal(weights(again), weights(train(tmp_path / "whole")))


def test_save_checkpoint_is_refused_outside_of_a_run(tmp_path: Path) -> None:
    with pytest.raises(NestedRunError, match=r"save_checkpoint\(\) must be called during a run.* export_model"):
        train(tmp_path).save_checkpoint()


@pytest.mark.parametrize("background", [False, True])
def test_a_run_that_an_exception_ends_between_steps_is_saved(tmp_path: Path, background: bool) -> None:
    class Broken(IterableDataset[Any]):
        @override
        def __iter__(self) -> Iterator[Any]:
            for index in range(24):
                if index == 16 and self.breaks:
                    raise RuntimeError("a bad sample")
                yield tiny_data()[index]

        breaks = True

    data = Broken()
    options: dict[str, Any] = {"checkpoint_every": None, "checkpoint_in_background": background}
    with pytest.raises(RuntimeError, match="a bad sample"):
        train(tmp_path / "run", data=data, max_steps=6, num_epochs=None, **options)
    assert names(tmp_path / "run") == [2]
    data.breaks = False
    again = train(tmp_path / "run", data=data, max_steps=6, num_epochs=None, resume=True)
    uninterrupted = train(tmp_path / "whole", data=data, max_steps=6, num_epochs=None)
    assert torch.equal(weights(again), weights(uninterrupted))


def test_a_run_that_an_exception_ends_within_a_step_is_not_saved(tmp_path: Path) -> None:
    class Raising(Saving):
        @override
        def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
            if self.progress.steps == 2:
                raise RuntimeError("in a step")
            return super().train_step(batch)

    def fail(_: object) -> None:
        raise RuntimeError("in a callback")

    with pytest.raises(RuntimeError, match="in a step"):
        train(tmp_path, Raising, checkpoint_every=None)
    with pytest.raises(RuntimeError, match="in a callback"):
        train(tmp_path, checkpoint_every=None, callbacks=[At(2, fail)])
    with pytest.raises(RuntimeError, match="in a step"):
        train(tmp_path, Raising, checkpoint_every=Steps(1), checkpoint_on_exception=False)
    assert names(tmp_path) == [1, 2]


class Poisoned(Saving):
    """Has a weight that becomes NaN."""

    @override
    def on_step_end(self, step: StepResult) -> None:
        super().on_step_end(step)
        if step.step == 2:
            with torch.no_grad():
                self.unwrapped_model.get_parameter("bias")[0] = math.nan


@pytest.mark.parametrize("background", [False, True])
def test_non_finite_weights_are_not_saved(tmp_path: Path, background: bool) -> None:
    with pytest.warns(UserWarning, match=r"not saved after step \d: \w+ holds NaN") as warned:
        train(tmp_path / "run", Poisoned, checkpoint_every=Steps(1), checkpoint_in_background=background)
    assert len(warned) == 5
    assert names(tmp_path / "run") == [1]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000001"]
    train(tmp_path / "asked", Poisoned, checkpoint_every=Steps(1), checkpoint_allows_non_finite=True)
    assert names(tmp_path / "asked") == [1, 2, 3, 4, 5, 6]


def saved_of_a_poisoned_rank(directory: Path, background: bool) -> list[int]:
    class PoisonedHere(Poisoned):
        @override
        def on_step_end(self, step: StepResult) -> None:
            super().on_step_end(step)
            if self._distributed.rank == 0:
                self.unwrapped_model.get_parameter("bias")[0].detach().fill_(0.0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(directory, PoisonedHere, checkpoint_every=Steps(1), checkpoint_in_background=background)
    return names(directory)


@pytest.mark.parametrize("background", [False, True])
def test_non_finite_weights_on_another_rank_are_not_saved(tmp_path: Path, background: bool) -> None:
    for steps in run_ranks(saved_of_a_poisoned_rank, 2, tmp_path, background):
        assert steps == [1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_run_and_sets_the_exit_code(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        train(tmp_path, callbacks=[At(2, lambda _: signal.raise_signal(number))], checkpoint_every=None)
    assert ended.value.code == 128 + number
    assert names(tmp_path) == [2]
    assert signal.getsignal(number) is before
    assert torch.equal(weights(train(tmp_path, resume=True)), weights(train(tmp_path / "whole")))


def test_a_second_ctrl_c_interrupts(tmp_path: Path) -> None:
    def twice(_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, callbacks=[At(2, twice)], checkpoint_every=None)
    with pytest.raises(KeyboardInterrupt):
        train(
            tmp_path / "without",
            callbacks=[At(2, lambda _: signal.raise_signal(signal.SIGINT))],
            checkpoint_signals=(),
            checkpoint_every=None,
        )
    assert names(tmp_path) == []


# ---- retention


def test_retention_rules_combine(tmp_path: Path) -> None:
    best = Best("eval_loss", mode="max", count=1)
    rules: dict[str, Any] = {"keep_last": 1, "keep_every": 4, "keep_best": best}
    train(tmp_path, checkpoint_every=Steps(1), evaluate_every=Steps(1), **rules)
    assert names(tmp_path) == [1, 4, 6]


def test_the_checkpoint_that_was_resumed_from_is_not_removed(tmp_path: Path) -> None:
    train(tmp_path, checkpoint_every=Steps(1), num_epochs=1)
    train(tmp_path, checkpoint_every=Steps(1), resume=tmp_path / "step-00000002", keep_last=1)
    assert names(tmp_path) == [2, 6]


def test_best_checkpoints_are_saved_at_any_interval(tmp_path: Path) -> None:
    callbacks = [SaveBest("eval_loss")]
    train(tmp_path, checkpoint_every=None, keep_last=1, callbacks=callbacks, evaluate_every=Steps(2))
    manifests = open_store(tmp_path).manifests()
    assert [(manifest.step, manifest.label) for manifest in manifests] == [(6, "eval_loss")]
    with pytest.raises(MonitorError, match="eval_los"):
        train(tmp_path / "typo", callbacks=[SaveBest("eval_los")])


# ---- resuming


def test_resume_continues_a_saved_run_or_starts_a_new_one(tmp_path: Path) -> None:
    noting = Noting()
    uninterrupted = train(tmp_path / "whole")
    first = train(tmp_path / "run", num_epochs=1, resume=True)
    assert first.progress.steps == 3
    second = train(tmp_path / "run", resume=True, callbacks=[noting])
    assert (noting.loaded, second.progress.steps) == (["step-00000003"], 6)
    assert torch.equal(weights(second), weights(uninterrupted))
    assert [epoch.train_loss for epoch in second.history] == [epoch.train_loss for epoch in uninterrupted.history]
    third = train(tmp_path / "run", resume=True)
    assert torch.equal(weights(third), weights(uninterrupted))
    assert names(tmp_path / "run") == [3, 6]


def test_a_new_run_in_the_directory_of_another_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"of another run, the last of them step-00000006.*resume=True"):
        train(tmp_path / "run")
    train(tmp_path / "other")
    with pytest.raises(CheckpointError, match="belongs to another run"):
        train(tmp_path / "run", resume=tmp_path / "other" / "step-00000003")


def test_each_run_of_a_trainer_has_its_own_directory(tmp_path: Path) -> None:
    def script(epochs: int) -> Saving:
        trainer = Saving(**tiny_parts(), checkpoint_dir=tmp_path / "run", resume=True)
        for _ in range(2):
            trainer.train(tiny_data(), num_epochs=epochs, per_device_batch_size=8)
        return trainer

    uninterrupted = script(2)
    assert (names(tmp_path / "run"), names(tmp_path / "run" / "run-2")) == ([3, 6], [3, 6])
    again = script(2)
    assert torch.equal(weights(again), weights(uninterrupted))


def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path: Path) -> None:
    uninterrupted = train(tmp_path, checkpoint_every=Steps(1))
    file = tmp_path / "step-00000006" / "shared.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 1
    file.write_bytes(damaged)
    with pytest.warns(UserWarning, match="step-00000006 is skipped: .*hash differs"):
        again = train(tmp_path, resume=True)
    assert torch.equal(weights(again), weights(uninterrupted))
    assert (tmp_path / "step-00000006.01").is_dir()
    with pytest.raises(DamagedCheckpointError, match="hash differs"):
        train(tmp_path / "other", resume=tmp_path / "step-00000006")


def test_a_run_without_an_intact_checkpoint_does_not_start_silently(tmp_path: Path) -> None:
    train(tmp_path, num_epochs=1)
    (tmp_path / "step-00000003" / "manifest.json").write_text("{}")
    with pytest.warns(UserWarning, match="is skipped"), pytest.raises(CheckpointError, match="none of them is intact"):
        train(tmp_path, resume=True)


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_stopped_run_stays_stopped_until_it_is_asked_to_continue(
    tmp_path: Path, step: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ptacc")
    stopped = train(tmp_path / "run", callbacks=[At(step, lambda trainer: trainer.stop("enough"))])
    again = train(tmp_path / "run", resume=True, num_epochs=9)
    assert f"the run was stopped (enough) after {step} steps, so nothing was trained" in caplog.messages[-1]
    assert (again.history.stop_reason, again.progress.steps) == ("enough", step)
    assert torch.equal(weights(again), weights(stopped))
    assert [epoch.values() for epoch in again.history] == [epoch.values() for epoch in stopped.history]
    resumed = train(tmp_path / "run", resume=True, resume_ignore={"stop"})
    assert (resumed.history.stop_reason, resumed.progress.steps) == (None, 6)
    assert torch.equal(weights(resumed), weights(train(tmp_path / "whole")))


def test_a_finished_run_says_so_and_returns_its_history(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ptacc")
    history = train(tmp_path / "run", num_epochs=2).history
    again = train(tmp_path / "run", resume=True, num_epochs=2)
    assert "Saving.train(): the run is complete after 6 steps, so nothing was trained." in caplog.messages[-1]
    assert list(again.history) == list(history)
    assert again.history.steps == history.steps
    assert train(tmp_path / "run", resume=True, num_epochs=3).progress.steps == 9


def test_a_run_that_stopped_early_stops_again(tmp_path: Path) -> None:
    class Stopping(EarlyStoppingMixin, Saving):
        early_stopping_patience = 1
        early_stopping_min_delta = 100.0

    first = train(tmp_path, Stopping, resume=True, num_epochs=9)
    again = train(tmp_path, Stopping, resume=True, num_epochs=9)
    assert first.progress.steps == again.progress.steps == 6
    assert first.history.stop_reason == again.history.stop_reason is not None
    assert list(first.history)[-1].train_loss == list(again.history)[-1].train_loss
    assert train(tmp_path, Stopping, resume=True, num_epochs=4, early_stopping_patience=5).progress.steps == 12


# ---- mismatches


def test_all_differences_are_reported_at_once(tmp_path: Path) -> None:
    class Averaging(EMAMixin, GradAccumMixin, Saving):
        ema_decay: float = 0.5

    train(tmp_path / "run", num_epochs=1)
    model = nn.Linear(4, 3, dtype=torch.float64)
    other: dict[str, Any] = {"model": model, "optimizer": AdamW(model.parameters())}
    with pytest.raises(CheckpointError) as refused:
        train(tmp_path / "run", Averaging, resume=True, data=tiny_data(16), gradient_accumulation_steps=2, **other)
    for message in (
        "optimizer was 'torch.optim.sgd.SGD' and is 'torch.optim.adamw.AdamW'",
        "accumulation_steps was '1' and is '2'",
        "data was '24 samples' and is '16 samples'",
        "the checkpoint has no part 'ema'",
        "the model's weight is float64 (3, 4), and the checkpoint's float64 (2, 4)",
    ):
        assert message in str(refused.value)


def test_a_difference_can_be_ignored_by_name(tmp_path: Path) -> None:
    class Averaging(EMAMixin, Saving):
        ema_decay: float = 0.5

    train(tmp_path / "run", num_epochs=1)
    again = train(tmp_path / "run", Averaging, resume=True, resume_ignore={"ema", "data"}, data=tiny_data(16))
    assert again.progress.steps == 5
    with pytest.raises(CheckpointError, match="the checkpoint has an unexpected part 'ema'"):
        train(tmp_path / "run", resume=True, data=tiny_data(16))


class Lambda:
    """Has a state that cannot be stored."""

    def state_dict(self) -> dict[str, Any]:
        return {"function": lambda: None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


ODD: StateKey[Lambda] = StateKey("odd")


def test_a_state_that_cannot_be_stored_is_refused_before_the_first_step(tmp_path: Path) -> None:
    class Odd(Mixin):
        @override
        def on_run_start(self) -> None:
            super().on_run_start()
            self.run[ODD] = Lambda()

    class OddSaving(Odd, Saving): ...

    before = weights(Saving(**tiny_parts(), checkpoint_dir=tmp_path)).clone()
    trainer = OddSaving(**tiny_parts(), checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"odd\['function'\] is a builtins.function, which cannot be stored"):
        trainer.train(tiny_data(), num_epochs=1)
    assert torch.equal(weights(trainer), before)


def test_the_history_file_continues_from_the_checkpoint(tmp_path: Path) -> None:
    file, expected = tmp_path / "history.jsonl", tmp_path / "expected.jsonl"
    train(tmp_path / "whole", history_file=expected)
    train(tmp_path / "run", history_file=file, num_epochs=1)
    with file.open("a") as lines:
        lines.write("of steps that came to nothing\n")
    train(tmp_path / "run", history_file=file, resume=True)
    assert read_lines(file)[1:] == read_lines(expected)[1:]
    file.write_text(file.read_text().replace("0", "1"))
    with pytest.raises(DamagedCheckpointError, match=r"not the history that was saved.*resume_ignore={'history'}"):
        train(tmp_path / "run", history_file=file, resume=True)
    file.unlink()
    with pytest.raises(DamagedCheckpointError, match="is missing"):
        train(tmp_path / "run", history_file=file, resume=True)
    train(tmp_path / "run", history_file=file, resume=True, resume_ignore={"history"}, num_epochs=3)


def test_a_resume_that_is_refused_keeps_the_history_after_its_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    train(tmp_path / "run", history_file=file, checkpoint_every=Steps(1))
    before, older = file.read_bytes(), tmp_path / "run" / "step-00000001"
    with pytest.raises(CheckpointError, match="seed was '5' and is '6'"):
        train(tmp_path / "run", history_file=file, resume=older, seed=6)
    assert file.read_bytes() == before


# ---- loading, exporting, signing


def test_weights_are_loaded_into_another_trainer(tmp_path: Path) -> None:
    noting = Noting()
    source = train(tmp_path / "run")
    other = Saving(**tiny_parts(), checkpoint_dir=tmp_path / "other", callbacks=[noting])
    other.load_checkpoint(tmp_path / "run", weights_only=True)
    assert torch.equal(weights(other), weights(source))
    assert not other.optimizer.state_dict()["state"]
    other.load_checkpoint(tmp_path / "run" / "step-00000006")
    assert other.optimizer.state_dict()["state"]
    assert noting.loaded == ["step-00000006", "step-00000006"]
    wide = nn.Linear(5, 2, dtype=torch.float64)
    parts: dict[str, Any] = {**tiny_parts(), "model": wide, "optimizer": SGD(wide.parameters())}
    with pytest.raises(CheckpointError, match=r"weight is float64 \(2, 5\), and the checkpoint's float64 \(2, 4\)"):
        Saving(**parts, checkpoint_dir=tmp_path / "other").load_checkpoint(tmp_path / "run")


def test_an_export_can_be_loaded_into_a_model(tmp_path: Path) -> None:
    class Averaging(EMAMixin, Saving):
        ema_decay: float = 0.5

    trainer = train(tmp_path / "run", Averaging)
    raw, averaged = tmp_path / "raw.safetensors", tmp_path / "averaged.safetensors"
    trainer.export_model(raw)
    trainer.export_model(averaged, averages="ema")
    model = nn.Linear(4, 2, dtype=torch.float64)
    model.load_state_dict(safetensors.torch.load_file(raw))
    assert torch.equal(model.weight, trainer.unwrapped_model.get_parameter("weight"))
    with trainer.around_evaluation_weights():
        model.load_state_dict(safetensors.torch.load_file(averaged))
        assert torch.equal(model.weight, trainer.unwrapped_model.get_parameter("weight"))
    with pytest.raises(CheckpointError, match="exists already"):
        trainer.export_model(raw)


def test_a_key_signs_checkpoints(tmp_path: Path) -> None:
    train(tmp_path, checkpoint_key=b"secret", num_epochs=1)
    train(tmp_path, checkpoint_key=b"secret", resume=True)
    with pytest.warns(UserWarning, match="not signed with the key"), pytest.raises(CheckpointError):
        train(tmp_path, checkpoint_key=b"another", resume=True)


def test_a_key_is_never_printed(tmp_path: Path) -> None:
    trainer = Saving(**tiny_parts(), checkpoint_dir=tmp_path, checkpoint_key=b"secret")
    assert "secret" not in f"{trainer!r} {trainer.explain()}"


def test_hosts_that_do_not_share_the_directory_are_detected(tmp_path: Path) -> None:
    def worker() -> str:
        manager.SEEN_WITHIN_SECONDS = 0.5
        here = tmp_path / os.environ["RANK"]
        here.mkdir()
        os.chdir(here)
        with pytest.raises((CheckpointError, RankFailedError)) as refused:
            train(Path("run"))
        return str(refused.value)

    refused = run_ranks(worker, 2)
    assert all("is not one directory for all processes" in message for message in refused)
    assert "rank 1 does not see" in refused[0]


def test_a_checkpoint_requested_by_one_process_is_refused(tmp_path: Path) -> None:
    def ask(trainer: Any) -> None:
        if trainer.distributed.rank == 0:
            trainer.save_checkpoint()

    def worker() -> str:
        with pytest.raises((CollectiveError, RankFailedError)) as refused:
            train(tmp_path, callbacks=[At(2, ask)], checkpoint_every=None)
        return str(refused.value)

    assert any("save_checkpoint()" in message for message in run_ranks(worker, 2))


def test_the_state_of_a_callback_is_resumed(tmp_path: Path) -> None:
    def best() -> RestoreBestWeights:
        return RestoreBestWeights("eval_loss", mode="max", restore=False)

    train(tmp_path, num_epochs=1, callbacks=[first := best()])
    train(tmp_path, callbacks=[again := best()], resume=True)
    assert (again.best_value, again.best_epoch) == (first.best_value, 1)
    assert torch.equal(again.best_weights["weight"], first.best_weights["weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint_every": 5}, "must be a cadence"),
        ({"keep_last": 0}, "keep_last=0"),
        ({"keep_best": "accuracy"}, "must be Best"),
        ({"checkpoint_errors": "ignore"}, '"raise" or "warn"'),
        ({"resume": 3}, "resume=3"),
        ({"checkpoint_dir": 3}, "checkpoint_dir=3"),
        ({"checkpoint_key": "text"}, "checkpoint_key"),
        ({"checkpoint_signals": (15,)}, "checkpoint_signals"),
        ({"resume_ignore": "ema"}, "resume_ignore='ema'"),
    ],
)
def test_invalid_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {**tiny_parts(), "checkpoint_dir": tmp_path, **options}
    with pytest.raises(OptionError, match=message):
        Saving(**given)


# ---- paths


class Somewhere:
    """A path of another library."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def test_a_run_resumes_from_a_link_to_a_checkpoint_or_to_a_directory(tmp_path: Path) -> None:
    train(tmp_path / "run", num_epochs=1)
    (tmp_path / "runs").symlink_to(tmp_path / "run")
    (tmp_path / "latest").symlink_to(tmp_path / "runs" / "step-00000003")
    for link in ("latest", "runs"):
        resumed = train(tmp_path / f"from-{link}", resume=tmp_path / link)
        assert resumed.history.steps[0].step == 1
        assert names(tmp_path / f"from-{link}") == [6]
    train(tmp_path / "runs", resume=True, keep_last=1)
    assert names(tmp_path / "run") == [3, 6]  # the one that it resumed from is kept


def test_two_processes_save_through_a_link_to_a_directory(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    steps = run_ranks(lambda: train(tmp_path / "link", checkpoint_every=None).progress.steps, 2)
    assert names(tmp_path / "run") == [steps[0]]


def test_a_link_to_a_checkpoint_can_be_loaded(tmp_path: Path) -> None:
    first = train(tmp_path / "run")
    (tmp_path / "latest").symlink_to("run/step-00000006")
    other = Saving(**tiny_parts(), checkpoint_dir=tmp_path / "other")
    other.load_checkpoint(Somewhere(tmp_path / "latest"))
    assert torch.equal(weights(other), weights(first))


def test_an_export_through_a_link_replaces_its_target(tmp_path: Path) -> None:
    trainer = train(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "weights")
    for overwrite in (False, True):
        trainer.export_model(Somewhere(tmp_path / "link"), overwrite=overwrite)
    assert (tmp_path / "link").is_symlink()
    assert set(safetensors.torch.load_file(tmp_path / "weights")) == {"weight", "bias"}


def test_a_home_directory_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    trainer = train(Path("~/run"), callbacks=[At(2, lambda trainer: trainer.save_checkpoint("~/mine"))])
    trainer.export_model("~/weights")
    trainer.load_checkpoint("~/mine")
    train(tmp_path / "again", resume="~/run")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "mine", "weights", "again"}


@pytest.mark.parametrize("empty", ["", " ", "\0"])
def test_an_empty_path_is_refused(tmp_path: Path, empty: str) -> None:
    for option in ("checkpoint_dir", "resume"):
        given: dict[str, Any] = {**tiny_parts(), "checkpoint_dir": tmp_path, option: empty}
        with pytest.raises(OptionError, match=rf"Saving\({option}=.*is not a path"):
            Saving(**given)
    trainer = Saving(**tiny_parts(), checkpoint_dir=Somewhere(tmp_path))
    for call in (trainer.load_checkpoint, trainer.export_model):
        with pytest.raises(OptionError, match="is not a path"):
            call(empty)


def test_a_normal_run_emits_no_warnings(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tmp_path, num_epochs=1)
        train(tmp_path, resume=True)


class Popping:
    """A tensor, of which `load_state_dict` empties the dictionary that it is given."""

    def __init__(self) -> None:
        self.value = torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.value = state_dict.pop("value")


POPPING = [StateKey[Popping]("all_ranks"), StateKey[Popping]("this_rank", each_rank=True)]


class ChangedAtEpochs(Saving):
    """Changes states in place when an epoch begins: after it has resumed, and before it loads its states again."""

    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        for key in POPPING:
            self.run[key] = Popping()

    @override
    def on_epoch_start(self) -> None:
        super().on_epoch_start()
        for key in POPPING:
            self.run[key].value += 1
        for state in self.optimizer.state.values():
            state["momentum_buffer"].zero_()


def test_objects_may_change_the_states_that_they_load(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", ChangedAtEpochs)
    train(tmp_path / "stopped", ChangedAtEpochs, max_steps=5)
    resumed = train(tmp_path / "stopped", ChangedAtEpochs, resume=True)
    assert torch.equal(weights(resumed), weights(whole))
    assert [resumed.run[key].value for key in POPPING] == [whole.run[key].value for key in POPPING]


def test_weights_are_not_loaded_during_a_run(tmp_path: Path) -> None:
    load = At(3, lambda trainer: trainer.load_checkpoint(tmp_path))
    with pytest.raises(NestedRunError, match=r"load_checkpoint\(\) was called during a run. Call it before"):
        train(tmp_path, callbacks=[load])


def test_other_versions_of_what_results_depend_on_are_reported(tmp_path: Path) -> None:
    saver = train(tmp_path).run[SAVER]
    state = saver.state_dict()
    with pytest.warns(UserWarning, match=r"resumes with other versions \(torch 1\.0 -> "):
        saver.load_state_dict({**state, "versions": {**state["versions"], "torch": "1.0"}})
