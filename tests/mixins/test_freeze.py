"""Unfreezing during a run: as in a plain loop, on one process and on two, by the mixin and by hand, and resumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from ptacc import (
    Callback,
    CheckpointMixin,
    DDPMixin,
    EMAMixin,
    Epochs,
    FreezeMixin,
    FSDPMixin,
    GradAccumMixin,
    GradClipMixin,
    LRSchedulerMixin,
    RunPlan,
    SeedMixin,
    Steps,
    SyncBatchNormMixin,
    Trainer,
    gradual_unfreezing,
)
from ptacc.core.hooks import TrainerCore
from ptacc.errors import ModelError, OptionError
from ptacc.model.averaging import AveragedWeights
from ptacc.protocols import SchedulerFactory
from tests.ranks import run_ranks

STEPS_PER_EPOCH, EPOCHS, BATCH = 3, 3, 8
SCHEDULE = gradual_unfreezing(["first", "second"])
"""The second block is trained from the second epoch on, the first block from the third."""


class Net(nn.Module):
    """Two blocks with a norm each, and a head. A bias before a norm would have a gradient of zero, and noise."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 6, bias=False), norm(6), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(6, 6, bias=False), norm(6), nn.Tanh())
        self.head = nn.Linear(6, 2)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.second(self.first(inputs)))
        return outputs


def one_cycle(optimizer: Optimizer, plan: RunPlan) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=0.05, total_steps=plan.total_steps)


class Tuning(SeedMixin, GradAccumMixin, GradClipMixin, LRSchedulerMixin, EMAMixin, SyncBatchNormMixin, Trainer):
    seed: int | None = 0
    max_grad_norm: float | None = 0.5
    ema_decay: float = 0.7
    create_scheduler: SchedulerFactory = one_cycle


class ByMixin(FreezeMixin, Tuning): ...


class ByHand(Callback[TrainerCore]):
    """Sets what is trained from the progress of a run."""

    @override
    def on_run_start(self, trainer: TrainerCore) -> None:
        freeze(trainer.unwrapped_model, trainer.progress.epochs)

    @override
    def on_epoch_start(self, trainer: TrainerCore) -> None:
        freeze(trainer.unwrapped_model, trainer.progress.epochs)


def freeze(model: nn.Module, epoch: int) -> None:
    for name, needed in (("first", 2), ("second", 1)):
        block = model.get_submodule(name)
        block.requires_grad_(epoch >= needed)
        block.get_submodule("1").train(epoch >= needed)


def make_parts(norm: Callable[[int], nn.Module] = nn.BatchNorm1d) -> tuple[Net, AdamW, TensorDataset]:
    torch.manual_seed(0)
    model = Net(norm).double()
    optimizer = AdamW(model.parameters(), lr=0.01)
    samples = STEPS_PER_EPOCH * BATCH
    return model, optimizer, TensorDataset(torch.randn(samples, 4).double(), torch.randint(2, (samples,)))


def options_of(way: str) -> dict[str, Any]:
    return {"unfreeze_at": SCHEDULE} if way == "mixin" else {"callbacks": [ByHand()]}


def train(
    way: str, *, ranks: int = 1, norm: Callable[[int], nn.Module] = nn.BatchNorm1d, **options: Any
) -> dict[str, Tensor]:
    """Train in the order of the data, and return weights, statistics, averages and losses."""
    limits: dict[str, Any] = {"num_epochs": EPOCHS, "max_steps": options.pop("max_steps", None)}
    kind: Any = ByMixin if way == "mixin" else Tuning
    if "fsdp_wrap" in options:
        kind = type("Sharded", (FSDPMixin, kind), {})
    if "checkpoint_dir" in options:
        kind = type("Saving", (CheckpointMixin, kind), {})
    model, optimizer, data = make_parts(norm)
    given: dict[str, Any] = {"loss_func": nn.CrossEntropyLoss(), "default_callbacks": ()} | options_of(way) | options
    trainer = kind(model, optimizer=optimizer, **given)
    size = BATCH // ranks // options.get("gradient_accumulation_steps", 1)
    in_order: dict[str, Any] = {"train_dataloader_kwargs": {"shuffle": False}, "per_device_batch_size": size}
    history = trainer.train(data, **in_order, **limits)
    averages = {f"ema.{name}": value for name, value in trainer.run.averages()["ema"].tensors.items()}
    return model.state_dict() | averages | {"losses": torch.tensor([step.loss for step in history.steps]).double()}


def train_plainly() -> dict[str, Tensor]:
    model, optimizer, data = make_parts()
    scheduler = OneCycleLR(optimizer, max_lr=0.05, total_steps=EPOCHS * STEPS_PER_EPOCH)
    average, losses = AveragedWeights(model), []
    for epoch in range(EPOCHS):
        freeze(model, epoch)
        for inputs, targets in DataLoader(data, BATCH):
            loss = functional.cross_entropy(model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            average.update(model, weight=1 - 0.7)
            scheduler.step()
            losses.append(loss.item())
    averages = {f"ema.{name}": value for name, value in average.tensors.items()}
    return model.state_dict() | averages | {"losses": torch.tensor(losses).double()}


every_way = pytest.mark.parametrize("way", ["mixin", "hand"])


def distance(result: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert result.keys() == expected.keys()
    return max(float((result[n].double() - v).norm()) / (float(v.double().norm()) or 1.0) for n, v in expected.items())


@every_way
def test_a_run_equals_a_plain_loop_to_the_last_bit(way: str) -> None:
    result, expected = train(way), train_plainly()
    assert [name for name, value in expected.items() if not torch.equal(result[name], value)] == []


@every_way
@pytest.mark.parametrize(("ranks", "accumulated"), [(1, 2), (2, 1), (2, 2)])
def test_the_split_of_a_step_makes_no_difference(way: str, ranks: int, accumulated: int) -> None:
    norm: type[nn.Module] = nn.BatchNorm1d if accumulated == 1 else nn.LayerNorm  # each batch has its own statistics
    expected = train(way, norm=norm)

    def split() -> dict[str, Tensor]:
        return train(way, ranks=ranks, norm=norm, gradient_accumulation_steps=accumulated)

    for result in run_ranks(split, ranks) if ranks > 1 else [split()]:
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def resume_from_every_step(way: str, ranks: int, directory: Path) -> tuple[int, list[str]]:
    """Return the number of checkpoints, and what differs from a run that was never interrupted."""
    expected = train(way, ranks=ranks, checkpoint_dir=directory / "whole", checkpoint_every=Steps(1))
    checkpoints, different = sorted((directory / "whole").glob("step-*")), list[str]()
    for path in checkpoints:
        resumed = train(way, ranks=ranks, checkpoint_dir=directory / f"after-{path.name}", resume=path)
        different += [f"{path.name}: {n}" for n, value in expected.items() if not torch.equal(resumed[n], value)]
    return len(checkpoints), different


@every_way
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_resumes_from_every_step(way: str, ranks: int, tmp_path: Path) -> None:
    ends = run_ranks(resume_from_every_step, ranks, way, ranks, tmp_path)
    assert ends == [(STEPS_PER_EPOCH * EPOCHS, [])] * ranks


# ---- bad input


def make(**options: Any) -> ByMixin:
    model, optimizer, _ = make_parts()
    return ByMixin(model, optimizer=optimizer, loss_func=nn.CrossEntropyLoss(), default_callbacks=(), **options)


@pytest.mark.parametrize("option", ["frozen", "unfreeze_at"])
def test_a_name_that_fits_nothing_is_refused_before_the_first_step(option: str) -> None:
    trainer = make(**{option: ["frist"] if option == "frozen" else {"frist": Epochs(1)}})
    with pytest.raises(ModelError, match=rf"{option}=...\): 'frist' names no parameter of Net.* Did you mean `first`"):
        trainer.train(make_parts()[2], num_epochs=1)


def test_a_parameter_to_unfreeze_has_to_be_in_the_optimizer() -> None:
    trainer = make(unfreeze_at=SCHEDULE)
    trainer.optimizer = SGD(trainer.model.get_submodule("head").parameters(), lr=0.1)
    with pytest.raises(ModelError, match=r"unfreeze_at=...\): no optimizer has first\.0\.weight"):
        trainer.train(make_parts()[2], num_epochs=1)


@pytest.mark.parametrize("options", [{"frozen": "first"}, {"frozen": [1]}, {"unfreeze_at": {"first": 2}}])
def test_options_of_other_types_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"must be a (list|mapping) of names"):
        make(**options)


def test_a_model_that_is_frozen_as_a_whole_is_refused() -> None:
    with pytest.raises(ModelError, match="nothing is trainable"):
        make(frozen=["*"]).train(make_parts()[2], num_epochs=1)


def unfreeze_with_ddp() -> None:
    class WithDDP(DDPMixin, ByMixin): ...

    model, optimizer, data = make_parts()
    options: dict[str, Any] = {"loss_func": nn.CrossEntropyLoss(), "sync_batch_norm": False, "unfreeze_at": SCHEDULE}
    with pytest.raises(OptionError, match="Leave DDPMixin and DeepSpeedMixin out"):
        WithDDP(model, optimizer=optimizer, default_callbacks=(), **options).train(data, num_epochs=1)


def test_unfreezing_is_refused_with_ddp() -> None:
    run_ranks(unfreeze_with_ddp, 2)


# ---- the rules


class Trace(Callback[TrainerCore]):
    """Records, for each step, which parameters are trained and which norms are in training mode."""

    def __init__(self) -> None:
        self.steps: list[tuple[list[str], list[str]]] = []

    @override
    def on_step_start(self, trainer: TrainerCore) -> None:
        model = trainer.unwrapped_model
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        norms = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm1d) and m.training]
        self.steps.append((trained, norms))


def trace(steps: int = 9, **options: Any) -> list[tuple[list[str], list[str]]]:
    traced = Trace()
    make(callbacks=[traced], **options).train(make_parts()[2], max_steps=steps, per_device_batch_size=BATCH)
    return traced.steps


def test_parameters_are_unfrozen_between_two_steps() -> None:
    steps = trace(unfreeze_at={"first.0": Steps(2), "first": Steps(5)})
    assert [trained[0] for trained, _ in steps] == ["second.0.weight"] * 2 + ["first.0.weight"] * 7
    assert ["first.1" in norms for _, norms in steps] == [False] * 5 + [True] * 4


def test_the_first_of_several_times_counts() -> None:
    steps = trace(4, frozen=["first"], unfreeze_at={"first.0": Epochs(1), "first.*": Steps(2)})
    assert [trained[0] for trained, _ in steps] == ["second.0.weight"] * 2 + ["first.0.weight"] * 2


def test_a_norm_stays_in_the_mode_that_the_user_gave_it() -> None:
    traced, trainer = Trace(), make(unfreeze_at=SCHEDULE)
    trainer.callbacks = [traced]
    trainer.model.get_submodule("first.1").eval()
    trainer.train(make_parts()[2], num_epochs=3, per_device_batch_size=BATCH)
    assert [norms for _, norms in traced.steps] == [[]] * 3 + [["second.1"]] * 6


def test_each_run_begins_frozen_and_ends_as_far_as_it_came() -> None:
    traced, trainer = Trace(), make(unfreeze_at=SCHEDULE)
    trainer.callbacks = [traced]
    for _ in range(2):
        trainer.train(make_parts()[2], num_epochs=2, per_device_batch_size=BATCH)
    assert [len(trained) for trained, _ in traced.steps] == [2, 2, 2, 5, 5, 5] * 2
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_what_the_user_froze_stays_frozen_unless_it_is_named() -> None:
    trainer = make(unfreeze_at={"first": Epochs(1)})
    trainer.model.requires_grad_(False).get_submodule("head").requires_grad_(True)
    trainer.train(make_parts()[2], num_epochs=2, per_device_batch_size=BATCH)
    frozen = [name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["second.0.weight", "second.1.weight", "second.1.bias"]
