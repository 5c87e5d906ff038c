"""A search or an assertion leaves nothing behind: no files, no output, no handlers, and every object as it was."""

import copy
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import Dataset, RandomSampler, Subset
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from ptacc import (
    Best,
    Callback,
    CheckpointMixin,
    EarlyStoppingMixin,
    EMAMixin,
    FSDPMixin,
    GradAccumMixin,
    LRSchedulerMixin,
    MetricsMixin,
    Mixin,
    Monitor,
    ProfilerMixin,
    RunPlan,
    SeedMixin,
    StepResult,
    SWAMixin,
    TrackingMixin,
    Trainer,
    TrainerCore,
)
from ptacc.errors import NestedRunError
from ptacc.rng import RandomStreams
from ptacc.testing import assert_overfits_one_batch, assert_split_invariant, tiny_data, tiny_parts
from ptacc.testing.laws import same
from ptacc.tracking import JSONLinesTracker
from ptacc.tuning import find_batch_size, find_learning_rate
from ptacc.tuning.isolated import isolated_copy
from tests.ranks import run_ranks


class Accumulating(GradAccumMixin, Trainer): ...


CHECKS: Mapping[str, Callable[[Accumulating, Any], object]] = {
    "find_learning_rate": lambda trainer, data: find_learning_rate(trainer, data, steps=10),
    "find_batch_size": lambda trainer, data: find_batch_size(trainer, data, global_batch_size=8, steps=2),
    "assert_overfits_one_batch": lambda trainer, data: assert_overfits_one_batch(trainer, data, steps=30, to=0.9),
    "assert_split_invariant": lambda trainer, data: assert_split_invariant(lambda: trainer, data),
}


@pytest.fixture(params=CHECKS)
def check(request: pytest.FixtureRequest) -> Callable[..., object]:
    return CHECKS[request.param]


@pytest.fixture(autouse=True)
def silence(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert tuple(capfd.readouterr()) == ("", "")


# ---- files


class Saving(CheckpointMixin, Accumulating): ...


@pytest.mark.parametrize("resume", [False, True])
def test_no_checkpoint_is_written_and_training_can_start(
    check: Callable[..., object], tmp_path: Path, resume: bool
) -> None:
    folder = tmp_path / "run"
    trainer = Saving(**tiny_parts(), checkpoint_dir=folder, resume=resume, keep_best=Best("eval_loss"))
    check(trainer, tiny_data(100))
    assert not folder.exists()
    trainer.train(tiny_data(), tiny_data(), num_epochs=1)
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]


def test_a_saved_run_is_neither_resumed_nor_changed(check: Callable[..., object], tmp_path: Path) -> None:
    Saving(**tiny_parts(), checkpoint_dir=tmp_path).train(tiny_data(), num_epochs=1)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    resumed = Saving(**tiny_parts(), checkpoint_dir=tmp_path, resume=True)
    check(resumed, tiny_data(100))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files
    assert resumed.train(tiny_data(), num_epochs=2).steps[-1].step == 6


class SavingItself(Saving):
    @override
    def on_step_end(self, step: StepResult) -> None:
        super().on_step_end(step)
        self.save_checkpoint(label="own")


def test_a_checkpoint_that_a_hook_asks_for_is_not_written(check: Callable[..., object], tmp_path: Path) -> None:
    check(SavingItself(**tiny_parts(), checkpoint_dir=tmp_path), tiny_data(100))
    assert list(tmp_path.iterdir()) == []


def test_no_history_file_is_written(check: Callable[..., object], tmp_path: Path) -> None:
    check(Accumulating(**tiny_parts(), history_file=tmp_path / "history.jsonl"), tiny_data(100))
    assert list(tmp_path.iterdir()) == []


class Profiled(ProfilerMixin, Accumulating): ...


def test_nothing_is_profiled(check: Callable[..., object], tmp_path: Path) -> None:
    trainer = Profiled(**tiny_parts(), profile_dir=tmp_path / "profile", profile_wait=0, profile_warmup=1)
    check(trainer, tiny_data(100))
    assert list(tmp_path.iterdir()) == []


class Reporting(Mixin):
    """A user's mixin that writes a file, except in an isolated copy."""

    report: Path

    @override
    def on_step_end(self, step: StepResult) -> None:
        super().on_step_end(step)
        if not self.is_isolated:
            self.report.write_text(str(step.step))


class ReportingTrainer(Reporting, Accumulating): ...


def test_a_users_mixin_can_tell_that_it_is_isolated(check: Callable[..., object], tmp_path: Path) -> None:
    trainer = ReportingTrainer(**tiny_parts(), report=tmp_path / "report")
    check(trainer, tiny_data(100))
    assert not trainer.is_isolated
    assert not trainer.report.exists()
    trainer.train(tiny_data(), num_epochs=1)
    assert trainer.report.read_text() == "3"


class KeepingRuns(Mixin):
    """A user's mixin that saves and resumes runs in its own way, through the hooks for that."""

    saves: list[str]

    @override
    def save_run_state(self) -> None:
        super().save_run_state()
        self.saves.append("save")

    @override
    def save_on_exception(self, error: BaseException) -> None:
        super().save_on_exception(error)
        self.saves.append("exception")


class KeepingTrainer(KeepingRuns, Accumulating): ...


def test_hooks_that_save_are_not_called(check: Callable[..., object]) -> None:
    trainer = KeepingTrainer(**tiny_parts(), saves=[])
    check(trainer, tiny_data(100))
    assert trainer.saves == []


# ---- signals, callbacks, output


class Listening(Accumulating):
    handlers: list[object]

    @override
    def on_step_end(self, step: StepResult) -> None:
        super().on_step_end(step)
        self.handlers.append(signal.getsignal(signal.SIGTERM))


def test_no_signal_handler_is_installed(check: Callable[..., object]) -> None:
    trainer, handler = Listening(**tiny_parts(), handlers=[]), signal.getsignal(signal.SIGTERM)
    check(trainer, tiny_data(100))
    assert set(trainer.handlers) == {handler}


class Recording(Callback[TrainerCore]):
    """Records its calls; its state is that record."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    @override
    def on_run_start(self, trainer: TrainerCore) -> None:
        self.calls.append("on_run_start")

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        self.calls.append("on_step_end")

    @override
    def on_run_end(self, trainer: TrainerCore) -> None:
        self.calls.append("on_run_end")

    @override
    def on_exception(self, trainer: TrainerCore, error: BaseException) -> None:
        self.calls.append("on_exception")

    def state_dict(self) -> dict[str, Any]:
        return {"calls": list(self.calls)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calls = state_dict["calls"]


class AddingCallbacks(Mixin):
    added: Recording

    @override
    def all_callbacks(self) -> list[Callback[Any]]:
        return [*super().all_callbacks(), self.added]


class AddingTrainer(AddingCallbacks, Accumulating): ...


def test_no_callback_is_called_and_nothing_is_printed(check: Callable[..., object]) -> None:
    parts = tiny_parts()
    del parts["default_callbacks"]  # a progress bar, and printed metrics
    callback, added = Recording(), Recording()
    trainer = AddingTrainer(**parts, callbacks=[callback], added=added)
    check(trainer, tiny_data(100))
    assert callback.calls == added.calls == []
    assert trainer.callbacks == [callback]


class Printing(Accumulating):
    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        self.print("a run starts")


def test_what_hooks_print_is_not_shown(check: Callable[..., object]) -> None:
    check(Printing(**tiny_parts()), tiny_data(100))


# ---- objects


class Drawing(nn.Module):
    """Draws random numbers, and keeps state in buffers, in extra state and in a module that does not train."""

    count: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Dropout(0.0).eval()
        self.body = tiny_parts()["model"]
        self.calls = 0
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(4, dtype=torch.float64), persistent=False)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += self.training
        self.count += 1
        self.seen = self.seen + inputs.mean(dim=0)
        torch.rand(())
        outputs: Tensor = self.body(self.frozen(inputs))
        return outputs

    @override
    def get_extra_state(self) -> int:
        return self.calls

    @override
    def set_extra_state(self, state: int) -> None:
        self.calls = state


class Smoothed(nn.Module):
    """A loss that keeps state in a buffer."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))

    @override
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(outputs, targets)
        self.total += loss.detach()
        return loss


class Everything(
    SeedMixin,
    LRSchedulerMixin,
    EMAMixin,
    FSDPMixin,
    SWAMixin,
    MetricsMixin,
    EarlyStoppingMixin,
    ProfilerMixin,
    TrackingMixin,
    CheckpointMixin,
    Accumulating,
):
    noise: torch.Generator

    @override
    def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        torch.rand((), generator=self.noise)
        return super().compute_train_loss(outputs, targets)


def one_cycle(optimizer: Optimizer, plan: RunPlan) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=0.01, total_steps=plan.total_steps)


def make_everything(folder: Path, **options: Any) -> Everything:
    model = Drawing()
    all_options: dict[str, Any] = {
        "loss_func": Smoothed(),
        "optimizer": torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.05, dtype=torch.float64), foreach=False),
        "default_callbacks": (),
        "create_scheduler": one_cycle,
        "ema_decay": 0.9,
        "swa_start": 1,
        "metrics": {"accuracy": MulticlassAccuracy(2)},
        "train_metrics": {"accuracy": MulticlassAccuracy(2)},
        "profile_wait": 1,
        "profile_dir": folder / "profile",
        "checkpoint_dir": folder / "checkpoints",
        "history_file": folder / "history.jsonl",
        "trackers": [JSONLinesTracker(folder / "values.jsonl")],
        "noise": torch.Generator().manual_seed(5),
    }
    return Everything(model, **all_options | options)


def snapshot(trainer: Everything) -> dict[str, Any]:
    """Return copies of all that a run could change."""
    modules = [trainer.model, trainer.loss_func]
    assert all(isinstance(module, nn.Module) for module in modules)
    parameters = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    metrics: list[Any] = [*trainer.metrics.values(), *trainer.train_metrics.values()]
    return copy.deepcopy(
        {
            "states": [module.state_dict() for module in modules if isinstance(module, nn.Module)],
            "buffers": dict(trainer.model.named_buffers()),
            "parameters": [parameter.detach() for parameter in parameters],
            "gradients": [parameter.grad for parameter in parameters],
            "flags": [module.training for module in trainer.model.modules()],
            "trainable": [parameter.requires_grad for parameter in parameters],
            "optimizer": trainer.optimizer.state_dict(),
            "attributes": sorted(vars(trainer.optimizer)),
            "streams": RandomStreams().state_dict(),
            "noise": trainer.noise.get_state(),
            "metrics": [(metric.tp, metric.fp) for metric in metrics],
        }
    )


@pytest.mark.parametrize("has_run", [False, True])
def test_every_object_is_as_it_was(
    check: Callable[..., object], tmp_path: Path, has_run: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = make_everything(tmp_path)
    if has_run:
        trainer.train(tiny_data(), tiny_data(), num_epochs=1)
        capfd.readouterr()  # the profile of that run
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    rate, members, files = trainer.optimizer.param_groups[0]["lr"], dict(vars(trainer)), sorted(tmp_path.rglob("*"))
    before, runs = snapshot(trainer), (trainer.run, trainer.history) if has_run else None
    check(trainer, tiny_data(100))
    assert same(snapshot(trainer), before)
    assert vars(trainer) == members
    assert trainer.optimizer.param_groups[0]["lr"] is rate
    assert sorted(tmp_path.rglob("*")) == files
    assert trainer.has_run == has_run
    assert runs is None or (trainer.run is runs[0] and trainer.history is runs[1])


class FailedError(Exception): ...


def failing_after(calls: int) -> Callable[[Tensor, Tensor], Tensor]:
    left = iter(range(calls))

    def loss_func(outputs: Tensor, targets: Tensor) -> Tensor:
        if next(left, None) is None:
            raise FailedError
        return nn.functional.cross_entropy(outputs, targets)

    return loss_func


def test_every_object_is_as_it_was_after_an_exception(check: Callable[..., object], tmp_path: Path) -> None:
    trainer = make_everything(tmp_path)
    before = snapshot(trainer)
    trainer.loss_func = failing_after(1)
    with pytest.raises(FailedError):
        check(trainer, tiny_data(100))
    trainer.loss_func = Smoothed()
    after = snapshot(trainer)
    assert same({**after, "states": after["states"][:1]}, {**before, "states": before["states"][:1]})
    assert list(tmp_path.iterdir()) == []
    assert not trainer.has_run


class Remembering(Mixin):
    """Keeps a state for the life of the trainer, and not for that of a run."""

    losses: list[float] = field(init=False, default_factory=list)

    @override
    def on_step_end(self, step: StepResult) -> None:
        super().on_step_end(step)
        self.losses.append(float(step.loss))


class RememberingTrainer(Remembering, Accumulating): ...


def test_state_of_the_trainers_life_is_not_changed(check: Callable[..., object]) -> None:
    trainer = RememberingTrainer(**tiny_parts())
    trainer.train(tiny_data(), num_epochs=1)
    check(trainer, tiny_data(100))
    assert len(trainer.losses) == 3


class Freezing(Accumulating):
    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        self.unwrapped_model.get_parameter("bias").requires_grad_(False)


def test_what_a_hook_freezes_is_trainable_again(check: Callable[..., object]) -> None:
    trainer = Freezing(**tiny_parts())
    check(trainer, tiny_data(100))
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


class Counting(list[tuple[Tensor, ...]]):
    """A dataset that remembers how often it was read."""

    reads = 0

    @override
    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return super().__getitem__(index)

    def state_dict(self) -> dict[str, Any]:
        return {"reads": self.reads}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.reads = state_dict["reads"]


def test_data_is_at_its_former_position(check: Callable[..., object]) -> None:
    data = Counting([tiny_data(100)[index] for index in range(100)])
    check(Accumulating(**tiny_parts()), data)
    assert data.reads == 0


class Curriculum(Dataset[tuple[Tensor, ...]]):
    """Counts epochs, and draws an order in each of them."""

    def __init__(self) -> None:
        self.epoch, self.order = -1, [*range(100)]

    def __len__(self) -> int:
        return 100

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.order = epoch, torch.randperm(100).tolist()

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        inputs, targets = tiny_data(100).tensors
        return inputs[self.order[index]], targets[self.order[index]]


@pytest.mark.parametrize("is_held", [False, True])
def test_data_is_in_its_former_epoch(check: Callable[..., object], is_held: bool) -> None:
    data = Curriculum()
    check(Accumulating(**tiny_parts()), Subset(data, range(100)) if is_held else data)
    assert vars(data) == {"epoch": -1, "order": [*range(100)]}


def test_evaluation_data_is_at_its_former_position() -> None:
    data = Counting([tiny_data(100)[index] for index in range(100)])
    assert_overfits_one_batch(Accumulating(**tiny_parts()), tiny_data(), eval_dataset={"a": data})
    assert_split_invariant(lambda: Accumulating(**tiny_parts()), tiny_data(100), eval_dataset=data)
    assert data.reads == 0


def test_a_sampler_is_at_its_former_position() -> None:
    generator = torch.Generator().manual_seed(0)
    sampler = RandomSampler(tiny_data(), generator=generator)
    before = generator.get_state()
    with isolated_copy(Accumulating(**tiny_parts()), tiny_data(), sampler, None):
        list(sampler)
    assert torch.equal(generator.get_state(), before)


# ---- what ends or disturbs a run of the copy


class Stopping(EarlyStoppingMixin, Accumulating):
    early_stopping_monitor: str | Monitor = "train_loss"
    early_stopping_patience = 1
    early_stopping_min_delta = 1e6


def test_the_copy_is_not_stopped_early() -> None:
    with isolated_copy(Stopping(**tiny_parts())) as trial:
        assert trial.train(tiny_data(), num_epochs=4).stop_reason is None


def test_a_call_within_a_run_is_an_error(check: Callable[..., object]) -> None:
    class Nesting(Callback[Accumulating]):
        @override
        def on_epoch_end(self, trainer: Accumulating, record: object) -> None:
            with pytest.raises(NestedRunError, match="within a run of Accumulating"):
                check(trainer, tiny_data(100))

    Accumulating(**tiny_parts(), callbacks=[Nesting()]).train(tiny_data(), num_epochs=1)


# ---- several processes


def check_on_ranks(folder: Path) -> list[str]:
    trainer = Saving(**tiny_parts(), checkpoint_dir=folder / "run", resume=True)
    for check in CHECKS.values():
        check(trainer, tiny_data(100))
    assert same(trainer.model.state_dict(), tiny_parts()["model"].state_dict())
    before = [path.name for path in folder.iterdir()]
    trainer.distributed.gather(None)
    trainer.train(tiny_data(), num_epochs=1)
    return before


def test_ranks_write_nothing_and_can_train_together(tmp_path: Path) -> None:
    assert run_ranks(check_on_ranks, 2, tmp_path) == [[], []]
    assert (tmp_path / "run").is_dir()


class Sharded(FSDPMixin, Trainer):
    fsdp_unshard_after_run: bool = False


def search_while_sharded(trains_before: bool) -> bool:
    trainer = Sharded(**tiny_parts())
    if trains_before:
        trainer.train(tiny_data(), num_epochs=1)
    before = [copy.deepcopy(parameter.detach()) for parameter in trainer.model.parameters()]
    find_learning_rate(trainer, tiny_data(), steps=10)
    after = [parameter.detach() for parameter in trainer.model.parameters()]
    return all(type(a) is type(b) and bool((a == b).all()) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("trains_before", [False, True])
def test_a_model_is_sharded_after_a_search_only_if_it_was_before(trains_before: bool) -> None:
    assert run_ranks(search_while_sharded, 2, trains_before) == [True, True]
