"""Schedulers of torch, transformers and timm step as in a plain loop, and resume in runs of any length."""

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import ChainedScheduler, CyclicLR, ExponentialLR, LambdaLR, LinearLR, OneCycleLR
from transformers import optimization
from typing_extensions import override

from ptacc import Callback, CheckpointMixin, LRSchedulerMixin, RunPlan, StepResult, Trainer, TrainerCore
from ptacc.errors import SchedulerError
from ptacc.protocols import SchedulerFactory
from ptacc.testing import tiny_data, tiny_parts
from tests.vision.environment import FOLDER as VISION

STEPS_PER_EPOCH = 3


Settings = dict[int, tuple[float, ...]]


class Scheduled(CheckpointMixin, LRSchedulerMixin, Trainer):
    """Records the settings that each step is made with."""

    settings: Settings = field(init=False, default_factory=dict, metadata={"saved": False})

    @override
    def on_gradients_ready(self, step: StepResult) -> None:
        super().on_gradients_ready(step)
        groups = self.optimizer.param_groups
        self.settings[step.step] = tuple(float(group[name]) for group in groups for name in ("lr", "momentum"))


def two_groups() -> dict[str, Any]:
    """Return parts whose optimizer has a group for the weight, and one for the bias."""
    parts = tiny_parts()
    groups: list[dict[str, Any]] = [{"params": [parts["model"].weight]}, {"params": [parts["model"].bias], "lr": 0.02}]
    return parts | {"optimizer": torch.optim.SGD(groups, lr=0.1, momentum=0.9)}


def train(directory: Path, create: SchedulerFactory, num_epochs: int, **options: Any) -> Settings:
    """Train with three steps an epoch, and return the settings of each step."""
    limit = options.pop("max_steps", None)
    parts: dict[str, Any] = {**two_groups(), "checkpoint_every": None, **options}
    trainer = Scheduled(**parts, checkpoint_dir=directory, resume=True, create_scheduler=create)
    trainer.train(tiny_data(24), tiny_data(8), num_epochs=num_epochs, max_steps=limit)
    return trainer.settings


@pytest.fixture
def timm_schedulers() -> Iterator[ModuleType]:
    """Import the schedulers of timm alone, from the folder into which the Makefile installs it."""
    package = ModuleType("timm")
    package.__path__ = [str(VISION / "timm")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "timm", package)
        yield importlib.import_module("timm.scheduler")
    for name in [name for name in sys.modules if name.startswith("timm.")]:
        del sys.modules[name]


# ---- the schedules, sized by the plan


def chained(optimizer: Optimizer, plan: RunPlan) -> ChainedScheduler:
    return ChainedScheduler([LinearLR(optimizer, total_iters=plan.total_steps), ExponentialLR(optimizer, 0.9)])


def sequential(optimizer: Optimizer, plan: RunPlan) -> lr_scheduler.SequentialLR:
    parts: list[Any] = [LinearLR(optimizer, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(optimizer, 9)]
    parts[1].T_max = plan.total_steps
    return lr_scheduler.SequentialLR(optimizer, parts, [plan.steps_per_epoch - 1])


TORCH: dict[str, SchedulerFactory] = {
    "ChainedScheduler": chained,
    "ConstantLR": lambda o, plan: lr_scheduler.ConstantLR(o, total_iters=plan.total_steps - 2),
    "CosineAnnealingLR": lambda o, plan: lr_scheduler.CosineAnnealingLR(o, plan.total_steps),
    "CosineAnnealingWarmRestarts": lambda o, plan: lr_scheduler.CosineAnnealingWarmRestarts(o, plan.num_epochs),
    "CyclicLR": lambda o, plan: CyclicLR(o, 0.01, 0.1, plan.total_steps // 2),
    "CyclicLR(scale_fn)": lambda o, plan: CyclicLR(o, 0.01, 0.1, plan.total_steps // 2, scale_fn=lambda x: 0.5 * x),
    "ExponentialLR": lambda o, plan: ExponentialLR(o, 0.9),
    "LambdaLR": lambda o, plan: LambdaLR(o, lambda step: 1 - step / plan.total_steps),
    "LinearLR": lambda o, plan: LinearLR(o, total_iters=plan.total_steps),
    "MultiStepLR": lambda o, plan: lr_scheduler.MultiStepLR(o, [plan.total_steps // 2, plan.total_steps - 2]),
    "MultiplicativeLR": lambda o, plan: lr_scheduler.MultiplicativeLR(o, lambda step: 1 - 1 / plan.total_steps),
    "OneCycleLR": lambda o, plan: OneCycleLR(o, 0.1, plan.total_steps),
    "PolynomialLR": lambda o, plan: lr_scheduler.PolynomialLR(o, plan.total_steps),
    "SequentialLR": sequential,
    "StepLR": lambda o, plan: lr_scheduler.StepLR(o, plan.num_epochs),
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "constant": {},
    "constant_with_warmup": {},
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {},
    "polynomial": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 2},
}


def of_transformers(name: str) -> SchedulerFactory:
    def create(optimizer: Optimizer, plan: RunPlan) -> Any:
        return optimization.get_scheduler(name, optimizer, 2, plan.total_steps, TRANSFORMERS[name])

    return create


TIMM: dict[str, dict[str, Any]] = {
    "CosineLRScheduler": {"noise_range_t": 3},
    "MultiStepLRScheduler": {},
    "PolyLRScheduler": {},
    "StepLRScheduler": {},
    "TanhLRScheduler": {},
    "WSDLRScheduler": {"decay_t": 1},
}


def of_timm(module: ModuleType, name: str, *, t_in_epochs: bool) -> SchedulerFactory:
    def create(optimizer: Optimizer, plan: RunPlan) -> Any:
        length = plan.num_epochs if t_in_epochs else plan.total_steps
        steps: dict[str, Any] = {"MultiStepLRScheduler": [2, length - 1], "StepLRScheduler": length / 3}
        of_length = {"decay_t": steps[name]} if name in steps else {"t_initial": length}
        options: dict[str, Any] = {"warmup_t": 1, "warmup_lr_init": 0.01, **of_length}
        return getattr(module, name)(optimizer, **options, t_in_epochs=t_in_epochs, **TIMM[name])

    return create


# ---- the rates of a plain loop


@pytest.mark.parametrize("t_in_epochs", [False, True])
@pytest.mark.parametrize("name", TIMM)
def test_a_scheduler_of_timm_gives_the_rates_of_a_plain_loop(
    tmp_path: Path, timm_schedulers: ModuleType, name: str, t_in_epochs: bool
) -> None:
    create = of_timm(timm_schedulers, name, t_in_epochs=t_in_epochs)
    optimizer = two_groups()["optimizer"]
    schedule: Any = create(optimizer, RunPlan.compute(4, STEPS_PER_EPOCH, None))
    expected = []
    for step in range(1, 4 * STEPS_PER_EPOCH + 1):
        expected.append(tuple(value for group in optimizer.param_groups for value in (group["lr"], 0.9)))
        schedule.step_update(step)
        if step % STEPS_PER_EPOCH == 0:
            schedule.step(step // STEPS_PER_EPOCH)
    assert list(train(tmp_path, create, 4).values()) == expected


def test_all_schedulers_of_timm_and_transformers_are_tried(timm_schedulers: ModuleType) -> None:
    names = {name for name in vars(timm_schedulers) if name.endswith("Scheduler")}
    assert names - {"PlateauLRScheduler"} == set(TIMM)
    by_values = {"reduce_lr_on_plateau", "greedy"}
    assert {kind.value for kind in optimization.TYPE_TO_SCHEDULER_FUNCTION} - by_values == set(TRANSFORMERS)


# ---- the length of the run changes when it resumes


def check_resumes_with_another_length(directory: Path, create: SchedulerFactory, **options: Any) -> None:
    """Compare a run of four epochs with one that was stopped in its second, and resumes with the four."""
    whole = train(directory / "whole", create, 4, **options)
    stopped = train(directory / "stopped", create, 2, max_steps=5, **options)
    resumed = train(directory / "stopped", create, 4, **options)
    assert len(stopped) == 5
    assert resumed == {step: settings for step, settings in whole.items() if step > 5}


@pytest.mark.parametrize("name", TORCH)
def test_a_scheduler_of_torch_takes_a_new_length(tmp_path: Path, name: str) -> None:
    check_resumes_with_another_length(tmp_path, TORCH[name])


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_scheduler_of_transformers_takes_a_new_length(tmp_path: Path, name: str) -> None:
    check_resumes_with_another_length(tmp_path, of_transformers(name))


@pytest.mark.parametrize("t_in_epochs", [False, True])
@pytest.mark.parametrize("name", TIMM)
def test_a_scheduler_of_timm_takes_a_new_length(
    tmp_path: Path, timm_schedulers: ModuleType, name: str, t_in_epochs: bool
) -> None:
    check_resumes_with_another_length(tmp_path, of_timm(timm_schedulers, name, t_in_epochs=t_in_epochs))


def test_a_rate_in_a_tensor_takes_a_new_length(tmp_path: Path) -> None:
    def in_tensors() -> dict[str, Any]:
        parts = two_groups()
        for group in parts["optimizer"].param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
        return parts

    whole = train(tmp_path / "whole", TORCH["LinearLR"], 4, **in_tensors())
    train(tmp_path / "stopped", TORCH["LinearLR"], 2, max_steps=5, **in_tensors())
    resumed = train(tmp_path / "stopped", TORCH["LinearLR"], 4, **in_tensors())
    assert resumed == {step: settings for step, settings in whole.items() if step > 5}


def test_so_does_a_scheduler_of_epochs(tmp_path: Path) -> None:
    def create(optimizer: Optimizer, plan: RunPlan) -> lr_scheduler.CosineAnnealingLR:
        return lr_scheduler.CosineAnnealingLR(optimizer, plan.num_epochs)

    check_resumes_with_another_length(tmp_path, create, scheduler_interval="epoch")


def test_a_scheduler_that_follows_a_value_keeps_its_state(tmp_path: Path) -> None:
    def create(optimizer: Optimizer, plan: RunPlan) -> lr_scheduler.ReduceLROnPlateau:
        return lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=1)

    whole = train(tmp_path / "whole", create, 4)
    train(tmp_path / "stopped", create, 2)  # complete epochs: a part of one would be evaluated as well
    resumed = train(tmp_path / "stopped", create, 4)
    assert resumed == {step: settings for step, settings in whole.items() if step > 6}


def test_settings_that_the_scheduler_does_not_change_are_resumed(tmp_path: Path) -> None:
    class Decaying(Scheduled):
        """Changes two settings of the optimizer during the run."""

        @override
        def on_run_start(self) -> None:
            super().on_run_start()
            if not self.progress.steps:
                self.optimizer.param_groups[0] |= {"weight_decay": 0.5, "mine": 7}

    options: dict[str, Any] = {"checkpoint_dir": tmp_path, "resume": True, "create_scheduler": TORCH["OneCycleLR"]}
    Decaying(**tiny_parts(), **options).train(tiny_data(24), num_epochs=1)
    resumed = Decaying(**tiny_parts(), **options, callbacks=[at_end := AtEnd()])
    resumed.train(tiny_data(24), num_epochs=2)
    assert (at_end.group["weight_decay"], at_end.group["mine"]) == (0.5, 7)


class AtEnd(Callback[TrainerCore]):
    """Keeps the settings of the first parameter group at the end of the run."""

    @override
    def on_run_end(self, trainer: TrainerCore) -> None:
        self.group = dict(trainer.optimizer.param_groups[0])


def test_the_settings_at_the_start_of_the_run_are_those_of_the_saved_run(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", TORCH["LinearLR"], 4)
    train(tmp_path / "stopped", TORCH["LinearLR"], 2, max_steps=5)
    other = two_groups()
    other["optimizer"].param_groups[0]["lr"] = 0.7
    with pytest.warns(UserWarning, match="settings of the saved run"):
        resumed = train(tmp_path / "stopped", TORCH["LinearLR"], 4, **other)
    assert resumed == {step: settings for step, settings in whole.items() if step > 5}


def test_another_scheduler_enters_at_the_present_step(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", TORCH["LinearLR"], 2)
    train(tmp_path / "stopped", TORCH["ExponentialLR"], 2, max_steps=5)
    resumed = train(tmp_path / "stopped", TORCH["LinearLR"], 2, resume_ignore={"scheduler"})
    assert resumed == {6: whole[6]}


def test_a_batch_of_another_size_changes_the_length(tmp_path: Path) -> None:
    """After three steps of 8 samples come twelve of 4."""
    train(tmp_path, TORCH["LambdaLR"], 2, max_steps=3)
    resumed = Scheduled(
        **two_groups(),
        checkpoint_dir=tmp_path,
        resume=True,
        resume_ignore={"batch_size"},
        create_scheduler=TORCH["LambdaLR"],
    )
    resumed.train(tiny_data(24), num_epochs=3, per_device_batch_size=4)
    assert [resumed.settings[step][0] for step in (4, 15)] == pytest.approx([0.1 * 12 / 15, 0.1 / 15])


def test_a_run_that_is_past_its_new_length_trains_nothing(tmp_path: Path) -> None:
    train(tmp_path, TORCH["OneCycleLR"], 2)
    assert train(tmp_path, TORCH["OneCycleLR"], 1) == {}


def test_a_scheduler_that_cannot_be_brought_to_the_present_step_is_refused(tmp_path: Path) -> None:
    def fixed(optimizer: Optimizer, plan: RunPlan) -> ChainedScheduler:
        return ChainedScheduler([OneCycleLR(optimizer, 0.1, 6)])

    train(tmp_path, fixed, 2)
    with pytest.raises(SchedulerError, match="after step 6 with another length, and ChainedScheduler"):
        train(tmp_path, lambda o, plan: ChainedScheduler([OneCycleLR(o, 0.1, 5)]), 4)


# ---- schedulers that are refused


class WithoutStep:
    """A scheduler to which a test adds `step`."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


STEP_FUNCTIONS: list[Any] = [
    lambda self, epoch: None,
    lambda self, num_updates: None,
    lambda self, metrics, epoch: None,
    lambda self, *, closure: None,
]


@pytest.mark.parametrize("step", STEP_FUNCTIONS)
def test_a_scheduler_whose_step_is_unknown_is_refused(tmp_path: Path, step: Any) -> None:
    kind: Any = type("Odd", (WithoutStep,), {"step": step})
    with pytest.raises(SchedulerError, match=r"returned a Odd, whose step\(.+\) is not known"):
        train(tmp_path, lambda o, plan: kind(), 1)


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated:FutureWarning")
def test_a_scheduler_that_does_not_save_its_counters_is_refused(tmp_path: Path, timm_schedulers: ModuleType) -> None:
    with pytest.raises(SchedulerError, match="PlateauLRScheduler, whose state_dict"):
        train(tmp_path, lambda o, plan: timm_schedulers.PlateauLRScheduler(o), 1)


def test_a_group_that_is_added_to_a_scheduled_optimizer_is_refused(tmp_path: Path) -> None:
    class Growing(Scheduled):
        @override
        def on_epoch_start(self) -> None:
            super().on_epoch_start()
            self.optimizer.add_param_group({"params": [self.unwrapped_model.bias]})

    parts = tiny_parts()
    parts["optimizer"] = torch.optim.SGD([parts["model"].weight], lr=0.1)
    parts["model"].bias.requires_grad_(False)
    trainer = Growing(**parts, checkpoint_dir=tmp_path, create_scheduler=TORCH["StepLR"])
    with pytest.raises(SchedulerError, match="has 2 parameter groups, and its StepLR was created for 1"):
        trainer.train(tiny_data(24), num_epochs=1)
