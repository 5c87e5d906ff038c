import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from typing_extensions import override

from ptacc import Callback, CheckpointMixin, GradAccumMixin, GradClipMixin, ProfilerMixin, Steps, Trainer, TrainerCore
from ptacc.errors import OptionError
from ptacc.protocols import DataLoaderKwargs
from ptacc.run.step_result import StepResult
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import run_ranks

IN_ORDER: DataLoaderKwargs = {"shuffle": False}
OF_A_STEP = ["data", "forward", "backward", "gradients_ready", "optimizer"]


class Profiled(ProfilerMixin, GradAccumMixin, GradClipMixin, Trainer):
    profile_wait = 1
    profile_warmup = 1
    profile_active = 2
    fails_in: int = 0

    @override
    def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.progress.steps + 1 == self.fails_in:
            raise KeyError("a mistake in the loss")
        return super().compute_train_loss(outputs, targets)


class Saved(CheckpointMixin, Profiled): ...


def train(folder: Path | None = None, *, max_steps: int = 8, evaluate: bool = False, **options: Any) -> Profiled:
    trainer = Profiled(**tiny_parts(), profile_dir=folder, **options)
    held_out, every = (tiny_data(8), Steps(1)) if evaluate else (None, Steps(100))
    trainer.train(tiny_data(), held_out, max_steps=max_steps, evaluate_every=every, train_dataloader_kwargs=IN_ORDER)
    return trainer


def events(trace: Path | None) -> list[dict[str, Any]]:
    assert trace is not None
    with gzip.open(trace) as file:
        found: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return sorted((event for event in found if "ts" in event), key=lambda event: float(event["ts"]))


def ranges(trace: Path | None) -> list[str]:
    """Return ptacc's ranges in the order of their starts, without the prefix."""
    return [event["name"][6:] for event in events(trace) if event["name"].startswith("ptacc/") and event["ph"] == "X"]


# ---- the trace


def test_a_trace_reads_like_the_loop(tmp_path: Path) -> None:
    (profile,) = train(tmp_path).profiles
    assert (profile.first_step, profile.num_steps) == (3, 2)
    assert profile.trace == tmp_path / "rank0_step3.pt.trace.json.gz"
    # Step 3 is the last of its epoch. The loader is asked for one more batch to find that out.
    assert ranges(profile.trace) == [*OF_A_STEP, "data", *OF_A_STEP]


def test_each_batch_of_an_accumulated_step_has_its_ranges(tmp_path: Path) -> None:
    (profile,) = train(tmp_path, profile_active=1, gradient_accumulation_steps=2).profiles
    passes = ["forward", "backward"] * 2
    assert ranges(profile.trace) == ["data", "data", *passes, "gradients_ready", "optimizer"]


def test_evaluations_have_ranges(tmp_path: Path) -> None:
    (profile,) = train(tmp_path, evaluate=True, profile_active=1).profiles
    assert ranges(profile.trace) == ["evaluation", *OF_A_STEP]


def test_the_operators_of_a_step_are_within_its_ranges(tmp_path: Path) -> None:
    (profile,) = train(tmp_path, profile_active=1).profiles
    found = {event["name"]: event for event in events(profile.trace) if event["ph"] == "X"}
    inner, outer = found["aten::addmm"], found["ptacc/forward"]
    assert outer["ts"] <= inner["ts"]
    assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]


def test_there_is_a_profile_for_each_cycle(tmp_path: Path) -> None:
    trainer = train(tmp_path, profile_repeat=2, max_steps=20)
    assert [(profile.first_step, profile.num_steps) for profile in trainer.profiles] == [(3, 2), (7, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "rank0_step3.pt.trace.json.gz",
        "rank0_step7.pt.trace.json.gz",
    ]
    assert [ranges(profile.trace).count("forward") for profile in trainer.profiles] == [2, 2]


@pytest.mark.parametrize(
    ("option", "column"), [("profile_memory", "CPU Mem"), ("profile_shapes", "Input Shapes"), ("profile_stacks", "")]
)
def test_optional_columns_are_in_the_table_if_requested(option: str, column: str) -> None:
    options: dict[str, Any] = {option: True}
    without, asked = train().profiles[0].table, train(**options).profiles[0].table
    assert not column or column not in without
    assert column in asked


def test_stacks_are_in_the_trace_and_not_in_the_table(tmp_path: Path) -> None:
    (profile,) = train(tmp_path, profile_stacks=True, profile_rows=1000).profiles
    functions = {event["name"] for event in events(profile.trace) if event.get("cat") == "python_function"}
    assert any("compute_train_loss" in name for name in functions)
    assert "aten::addmm" in profile.table
    assert "compute_train_loss" not in profile.table


def test_the_table_is_printed_once(capfd: pytest.CaptureFixture[str]) -> None:
    trainer = train(profile_rows=3)
    printed = capfd.readouterr().out
    assert printed.count(trainer.profiles[0].table) == 1
    assert printed.count("Profile of 2 steps, from step 3 on.") == 1


# ---- no side effects


def test_losses_and_weights_are_equal_to_the_bit() -> None:
    options: dict[str, Any] = {"evaluate": True, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    profiled = train(profile_memory=True, profile_shapes=True, profile_stacks=True, profile_repeat=2, **options)
    later = train(profile_wait=1000, **options)
    assert len(profiled.profiles) == 2
    assert not later.profiles
    assert profiled.history.steps == later.history.steps
    weights = (trainer.model.get_parameter("weight") for trainer in (profiled, later))
    assert torch.equal(*weights)


class Marks(Callback[TrainerCore]):
    """Records after each step whether calls have ranges, and whether a profiler is on."""

    def __init__(self) -> None:
        self.recorded: list[tuple[bool, bool]] = []

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        is_marked = "train_step" in vars(trainer) and "update" in vars(trainer.run.engine)
        self.recorded.append((is_marked, _profiler_enabled()))


def test_the_ranges_are_removed_after_the_last_cycle() -> None:
    marks = Marks()
    train(callbacks=[marks])
    assert marks.recorded == [(True, False), (True, True), (True, True), *[(False, False)] * 5]


def test_a_second_run_is_profiled_like_the_first() -> None:
    trainer = train()
    trainer.train(tiny_data(), num_epochs=3)
    assert [(profile.first_step, profile.num_steps) for profile in trainer.profiles] == [(3, 2)]


def save(folder: Path, *, max_steps: int, **options: Any) -> Saved:
    trainer = Saved(**tiny_parts(), checkpoint_dir=folder, checkpoint_every=Steps(5), **options)
    trainer.train(tiny_data(), max_steps=max_steps)
    return trainer


def test_checkpoints_have_ranges(tmp_path: Path) -> None:
    (profile,) = save(tmp_path, max_steps=8, profile_wait=3, profile_dir=tmp_path / "traces").profiles
    assert ranges(profile.trace) == ["checkpoint", *OF_A_STEP] * 2  # both steps check whether a checkpoint is due


def test_a_resumed_run_is_profiled_from_its_own_start(tmp_path: Path) -> None:
    save(tmp_path, max_steps=5)
    resumed = save(tmp_path, max_steps=12, resume=True)
    assert [(profile.first_step, profile.num_steps) for profile in resumed.profiles] == [(8, 2)]


# ---- interrupted runs


def test_an_exception_in_a_profiled_step_writes_the_recorded_steps(tmp_path: Path) -> None:
    trainer = Profiled(**tiny_parts(), profile_dir=tmp_path, fails_in=4)
    with pytest.raises(KeyError, match="a mistake in the loss"):
        trainer.train(tiny_data(), max_steps=8)
    (profile,) = trainer.profiles
    assert (profile.first_step, profile.num_steps) == (3, 1)
    assert ranges(profile.trace)[-2:] == ["data", "forward"]
    assert not _profiler_enabled()
    trainer.fails_in = 0
    trainer.train(tiny_data(), max_steps=8)
    assert trainer.profiles[0].num_steps == 2


def test_an_exception_in_the_first_recorded_step_writes_a_profile(tmp_path: Path) -> None:
    trainer = Profiled(**tiny_parts(), profile_dir=tmp_path, fails_in=3)
    with pytest.raises(KeyError, match="a mistake in the loss"):
        trainer.train(tiny_data(), max_steps=8)
    assert [profile.num_steps for profile in trainer.profiles] == [0]
    assert ranges(trainer.profiles[0].trace) == ["data", "forward"]


def test_an_exception_in_data_loading_writes_a_profile(tmp_path: Path) -> None:
    inputs, targets = tiny_data().tensors
    samples = [*zip(inputs[:20], targets[:20], strict=True), (torch.zeros(3), torch.tensor(0))]
    trainer = Profiled(**tiny_parts(), profile_dir=tmp_path)
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        trainer.train(samples, num_epochs=1, train_dataloader_kwargs=IN_ORDER)
    (profile,) = trainer.profiles
    assert (profile.first_step, ranges(profile.trace)) == (3, ["data"])


@pytest.mark.parametrize("fails_in", [1, 2])
def test_an_exception_before_recording_writes_no_profile(fails_in: int) -> None:
    trainer = Profiled(**tiny_parts(), fails_in=fails_in)
    with pytest.raises(KeyError):
        trainer.train(tiny_data(), max_steps=8)
    assert trainer.profiles == ()
    assert not _profiler_enabled()


def test_a_run_that_ends_while_recording_writes_the_recorded_steps() -> None:
    assert [(profile.first_step, profile.num_steps) for profile in train(max_steps=3).profiles] == [(3, 1)]


def test_a_run_that_ends_before_recording_prints_a_message(capfd: pytest.CaptureFixture[str]) -> None:
    assert train(max_steps=2).profiles == ()
    said = "No step was profiled: the run ended within 1 skipped and 1 warm-up steps."
    assert said in capfd.readouterr().out


class Removing(Callback[TrainerCore]):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @override
    def on_step_start(self, trainer: TrainerCore) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="could not be written, and the run continues"):
        trainer = train(tmp_path / "traces", callbacks=[Removing(tmp_path / "traces")])
    assert trainer.progress.steps == 8
    assert trainer.profiles[0].trace is None


def test_an_invalid_profile_dir_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    trainer = Profiled(**tiny_parts(), profile_dir=tmp_path / "taken")
    with pytest.raises(FileExistsError):
        trainer.train(tiny_data(), max_steps=8)
    assert trainer.progress.steps == 0


@pytest.mark.parametrize(
    ("option", "value", "what"),
    [
        ("profile_wait", -1, "at least 0"),
        ("profile_warmup", 0, "at least 1"),
        ("profile_active", 0, "at least 1"),
        ("profile_repeat", 0, "at least 1"),
        ("profile_rows", 0, "at least 1"),
        ("profile_dir", "s3://bucket/traces", "Give a local path"),
    ],
)
def test_invalid_options_are_refused(option: str, value: object, what: str) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(OptionError, match=what):
        Profiled(**tiny_parts(), **options)


# ---- several processes


def test_each_process_has_its_trace_and_the_first_prints(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def worker() -> tuple[str, int]:
        (profile,) = train(tmp_path).profiles
        assert profile.trace is not None
        return profile.trace.name, ranges(profile.trace).count("backward")

    assert run_ranks(worker, 2) == [(f"rank{rank}_step3.pt.trace.json.gz", 2) for rank in range(2)]
    assert capfd.readouterr().out.count("Profile of 2 steps") == 1
