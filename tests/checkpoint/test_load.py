"""Loading a checkpoint into a model that differs in part: what is named, and what a pattern leaves as it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from typing_extensions import override

from ptacc import CheckpointMixin, EMAMixin, LRSchedulerMixin, OptimizerDict, RunPlan, Trainer
from ptacc.errors import CheckpointError, OptionError
from ptacc.protocols import SchedulerLike
from ptacc.testing import tiny_data


class Classifier(nn.Module):
    def __init__(self, classes: int = 2, *, has_bias: bool = True, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Linear(4, 8)
        self.head = nn.Linear(8, classes, bias=has_bias)
        self.double()

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body(inputs).relu())
        return outputs


class Saving(CheckpointMixin, Trainer): ...


class Averaging(EMAMixin, Saving):
    ema_decay: float = 0.5


def make(directory: Path, model: nn.Module, kind: type[Saving] = Saving, optimizer: Optimizer | None = None) -> Saving:
    optimizer = Adam(model.parameters(), lr=0.01) if optimizer is None else optimizer
    options: dict[str, Any] = {"optimizer": optimizer, "checkpoint_dir": directory, "default_callbacks": ()}
    return kind(model, loss_func=nn.CrossEntropyLoss(), **options)


@pytest.fixture
def saved(tmp_path: Path) -> Saving:
    return train(make(tmp_path / "saved", Classifier(), Averaging))


def train(trainer: Saving) -> Saving:
    trainer.train(tiny_data(24), max_steps=3, per_device_batch_size=8)
    return trainer


def copy_weights(trainer: Saving) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


OTHERS = [Classifier(5, seed=1), Classifier(has_bias=False, seed=1), Classifier(seed=1)]


@pytest.mark.parametrize("model", OTHERS, ids=["another shape", "a missing parameter", "the same shape"])
def test_what_a_pattern_covers_keeps_the_values_of_the_model(tmp_path: Path, saved: Saving, model: nn.Module) -> None:
    trainer = make(tmp_path / "new", model)
    own, its = copy_weights(trainer), copy_weights(saved)
    trainer.load_checkpoint(tmp_path / "saved", ignore={"model.head.*"})
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, own[name] if name.startswith("head.") else its[name])


def test_an_extra_parameter_of_the_model_is_covered(tmp_path: Path) -> None:
    train(make(tmp_path / "saved", Classifier(has_bias=False)))
    trainer = make(tmp_path / "new", Classifier(seed=1))
    own = copy_weights(trainer)
    trainer.load_checkpoint(tmp_path / "saved", ignore=["model.head.bias"])
    assert torch.equal(trainer.model.state_dict()["head.bias"], own["head.bias"])


def test_differences_are_named_and_nothing_is_loaded(tmp_path: Path, saved: Saving) -> None:
    trainer = make(tmp_path / "new", Classifier(5, seed=1))
    own = copy_weights(trainer)
    with pytest.raises(CheckpointError, match=r"(?s)head.bias is float64 \(5,\).*ignore=\['model.head.bias', 'model.h"):
        trainer.load_checkpoint(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"(?s)head.weight is(?!.*head.bias)"):
        trainer.load_checkpoint(tmp_path / "saved", ignore={"model.head.bias"})
    assert all(torch.equal(tensor, own[name]) for name, tensor in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    ("pattern", "advice"),
    [("head.*", r"mean `model\.head\.\*`"), ("model.heads", "names such as"), ("model.head.weigth", "head.weight`")],
)
def test_a_pattern_that_covers_nothing_is_refused(tmp_path: Path, saved: Saving, pattern: str, advice: str) -> None:
    with pytest.raises(OptionError, match=f"{pattern[:5]}.*matches no tensor .*{advice}"):
        saved.load_checkpoint(tmp_path / "saved", ignore={"model.body", pattern})


def test_a_name_instead_of_names_is_refused(tmp_path: Path, saved: Saving) -> None:
    with pytest.raises(OptionError, match=r"ignore='model.head'\): must be a collection of names"):
        saved.load_checkpoint(tmp_path / "saved", ignore="model.head")


def adam(model: Classifier) -> Optimizer:
    return Adam(model.parameters(), lr=0.02)


def adam_with_groups(model: Classifier) -> Optimizer:
    head: dict[str, Any] = {"params": [*model.head.parameters()], "lr": 0.5}
    return Adam([head, {"params": [*model.body.parameters()]}], lr=0.02)


def adam_for_each(model: Classifier) -> Optimizer:
    return OptimizerDict({"a": Adam(model.head.parameters(), lr=0.5), "b": Adam(model.body.parameters(), lr=0.02)})


@pytest.mark.parametrize("make_optimizer", [adam, adam_with_groups, adam_for_each])
@pytest.mark.parametrize("model", OTHERS[:2], ids=["another shape", "a missing parameter"])
def test_the_optimizer_gets_the_states_of_the_other_parameters(
    tmp_path: Path, make_optimizer: Any, model: Classifier
) -> None:
    first = Classifier()
    saved = train(make(tmp_path / "saved", first, optimizer=make_optimizer(first)))
    optimizer = make_optimizer(model)
    trainer = make(tmp_path / "new", model, optimizer=optimizer)
    trainer.load_checkpoint(tmp_path / "saved", ignore={"model.head"})
    for name, parameter in model.body.named_parameters():
        its = saved.optimizer.state[first.body.get_parameter(name)]
        assert torch.equal(optimizer.state[parameter]["exp_avg"], its["exp_avg"])
    assert not any(parameter in optimizer.state for parameter in model.head.parameters())
    train(trainer)


def test_a_group_of_ignored_parameters_keeps_its_settings(tmp_path: Path) -> None:
    first, second = Classifier(), Classifier(5)
    train(make(tmp_path / "saved", first, optimizer=adam_with_groups(first)))
    optimizer = adam_with_groups(second)
    for group in optimizer.param_groups:
        group["lr"] = 0.125
    make(tmp_path / "new", second, optimizer=optimizer).load_checkpoint(tmp_path / "saved", ignore={"model.head"})
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.02]


def test_averages_of_ignored_tensors_are_the_values_of_the_model(tmp_path: Path, saved: Saving) -> None:
    trainer = make(tmp_path / "new", Classifier(5, seed=1), Averaging)
    assert isinstance(trainer, Averaging)
    assert isinstance(saved, Averaging)
    own = copy_weights(trainer)
    trainer.load_checkpoint(tmp_path / "saved", ignore={"model.head"})
    with trainer.averaged_weights(), saved.averaged_weights():
        assert torch.equal(trainer.model.state_dict()["head.weight"], own["head.weight"])
        assert torch.equal(trainer.model.state_dict()["body.weight"], saved.model.state_dict()["body.weight"])


# ---- schedules


class Scheduled(LRSchedulerMixin, Saving): ...


def make_scheduler(name: str, optimizer: Optimizer, plan: RunPlan) -> SchedulerLike:
    schedulers: dict[str, Any] = {
        "cosine": lambda: CosineAnnealingLR(optimizer, plan.total_steps),
        "lambda": lambda: LambdaLR(optimizer, lambda step: 0.5**step),
        "one cycle": lambda: OneCycleLR(optimizer, max_lr=0.1, total_steps=plan.total_steps),
        "cyclic": lambda: CyclicLR(optimizer, base_lr=0.01, max_lr=0.1, step_size_up=2),
        "step": lambda: StepLR(optimizer, step_size=1),
        "plateau": lambda: ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=1.0),
    }
    scheduler: SchedulerLike = schedulers[name]()
    return scheduler


def make_scheduled(directory: Path, name: str, *, two_groups: bool = False) -> Scheduled:
    model = Classifier()
    groups = [{"params": model.head.parameters(), "lr": 0.02}, {"params": model.body.parameters()}]
    optimizer = SGD(groups if two_groups else model.parameters(), lr=0.05, momentum=0.8)  # type: ignore[arg-type]
    return Scheduled(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=optimizer,
        checkpoint_dir=directory,
        create_scheduler=lambda optimizer, plan: make_scheduler(name, optimizer, plan),
        scheduler_monitor="train_loss",
        default_callbacks=(),
    )


def learning_rates(trainer: Scheduled) -> list[tuple[float, dict[str, float]]]:
    history = trainer.train(tiny_data(24), num_epochs=2, per_device_batch_size=8)
    return [(step.learning_rate, dict(step.logged)) for step in history.steps]


@pytest.mark.parametrize("two_groups", [False, True])
@pytest.mark.parametrize("name", ["cosine", "lambda", "one cycle", "cyclic", "step", "plateau"])
def test_a_new_run_starts_its_schedule_as_the_saved_run_did(tmp_path: Path, name: str, *, two_groups: bool) -> None:
    expected = learning_rates(make_scheduled(tmp_path / "saved", name, two_groups=two_groups))
    loaded = make_scheduled(tmp_path / "new", name, two_groups=two_groups)
    loaded.load_checkpoint(tmp_path / "saved")
    assert learning_rates(loaded) == expected


def test_a_trainer_without_a_schedule_gets_the_rate_from_before_it(tmp_path: Path) -> None:
    scheduled = make_scheduled(tmp_path / "saved", "cosine")
    scheduled.train(tiny_data(24), num_epochs=2, per_device_batch_size=8)
    loaded = make(tmp_path / "new", model := Classifier(), optimizer=SGD(model.parameters(), lr=0.3, momentum=0.9))
    loaded.load_checkpoint(tmp_path / "saved")
    (group,) = loaded.optimizer.param_groups
    assert (group["lr"], group["momentum"], "initial_lr" in group) == (0.05, 0.8, False)
    assert len(loaded.optimizer.state) == 4
