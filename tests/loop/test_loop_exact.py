"""The loop computes what a plain PyTorch loop over the same batches computes, to the last bit."""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Subset, TensorDataset
from typing_extensions import override

from ptacc import GradAccumMixin, GradClipMixin, LRSchedulerMixin, Pair, RunHistory, StepOutput, Trainer

EPOCHS, BATCH = 3, 8


class FullTrainer(GradAccumMixin, GradClipMixin, LRSchedulerMixin, Trainer): ...


class ClippingTrainer(GradAccumMixin, GradClipMixin, Trainer): ...


@dataclass(frozen=True)
class Setting:
    accumulation: int = 1
    max_norm: float | None = None
    is_scheduled: bool = False
    samples: int = 48


def make_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 3))


def make_data(samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(samples, 5, generator=generator)
    return TensorDataset(inputs, torch.randint(0, 3, (samples,), generator=generator))


def make_optimizer(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=0.01)


def train_plainly(net: nn.Module, setting: Setting) -> list[float]:
    """Train by hand, each window divided by the items that are in it, and return every step's loss."""
    # With its own generator: else each iterator draws from the one that dropout draws from.
    loader = DataLoader(make_data(setting.samples), batch_size=BATCH, generator=torch.Generator())
    optimizer = make_optimizer(net)
    steps = -(-len(loader) // setting.accumulation)
    scheduler = OneCycleLR(optimizer, 0.05, total_steps=EPOCHS * steps) if setting.is_scheduled else None
    losses: list[float] = []
    net.train()
    for _ in range(EPOCHS):
        batches = list(loader)
        for start in range(0, len(batches), setting.accumulation):
            window = batches[start : start + setting.accumulation]
            total = 0.0 * torch.zeros(())
            items = sum(len(targets) for _, targets in window)
            is_even = len({len(targets) for _, targets in window}) == 1
            for inputs, targets in window:
                loss = nn.functional.cross_entropy(net(inputs), targets)
                loss = loss / len(window) if is_even else loss * len(targets) / items
                loss.backward()  # type: ignore[no-untyped-call]
                total = total + loss.detach()
            if setting.max_norm is not None:
                clip_grad_norm_(net.parameters(), setting.max_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
            losses.append(float(total))
    return losses


def train_with_ptacc(net: nn.Module, setting: Setting, *, use_loader: bool = False) -> RunHistory:
    parts = {"loss_func": nn.CrossEntropyLoss(), "optimizer": make_optimizer(net), "default_callbacks": ()}
    options = {"gradient_accumulation_steps": setting.accumulation, "max_grad_norm": setting.max_norm}
    trainer: Trainer
    if setting.is_scheduled:
        trainer = FullTrainer(
            net,
            **parts,  # type: ignore[arg-type]  # built once for three classes
            **options,  # type: ignore[arg-type]
            create_scheduler=lambda optimizer, plan: OneCycleLR(optimizer, 0.05, total_steps=plan.total_steps),
        )
    elif setting.accumulation > 1 or setting.max_norm is not None:
        trainer = ClippingTrainer(net, **parts, **options)  # type: ignore[arg-type]
    else:
        trainer = Trainer(net, **parts)  # type: ignore[arg-type]
    data = make_data(setting.samples)
    if use_loader:
        return trainer.train(DataLoader(data, batch_size=BATCH), num_epochs=EPOCHS)
    return trainer.train(
        data, num_epochs=EPOCHS, per_device_batch_size=BATCH, train_dataloader_kwargs={"shuffle": False}
    )


def get_weights(net: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def compare(setting: Setting, *, use_loader: bool = False) -> tuple[list[float], list[float], Tensor, Tensor]:
    plain_net, net = make_net(), make_net()
    torch.manual_seed(3)
    plain = train_plainly(plain_net, setting)
    torch.manual_seed(3)
    history = train_with_ptacc(net, setting, use_loader=use_loader)
    return plain, [step.loss for step in history.steps], get_weights(plain_net), get_weights(net)


EVEN = [
    Setting(accumulation, max_norm, is_scheduled)
    for accumulation, max_norm, is_scheduled in itertools.product((1, 2, 3), (None, 0.5), (False, True))
]
RAGGED = [
    Setting(accumulation, max_norm, is_scheduled, samples)
    for accumulation, max_norm, is_scheduled in itertools.product((1, 2, 4), (None, 0.5), (False, True))
    for samples in (41, 44, 61)
]


@pytest.mark.parametrize("setting", EVEN, ids=str)
def test_even_windows_equal_a_plain_loop_to_the_last_bit(setting: Setting) -> None:
    plain, ours, plain_weights, weights = compare(setting)
    assert ours == plain
    assert torch.equal(weights, plain_weights)


@pytest.mark.parametrize("setting", EVEN[:4], ids=str)
def test_a_dataloader_gives_the_same(setting: Setting) -> None:
    plain, ours, plain_weights, weights = compare(setting, use_loader=True)
    assert ours == plain
    assert torch.equal(weights, plain_weights)


@pytest.mark.parametrize("setting", RAGGED, ids=str)
def test_ragged_windows_are_within_rounding_of_the_right_reference(setting: Setting) -> None:
    plain, ours, plain_weights, weights = compare(setting)
    assert ours == pytest.approx(plain, rel=1e-6)
    torch.testing.assert_close(weights, plain_weights, rtol=1e-5, atol=1e-6)


def test_the_users_loss_tensor_is_not_changed() -> None:
    seen: list[Tensor] = []

    def loss_func(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(nn.functional.cross_entropy(outputs, targets))
        return seen[-1]

    net = make_net()
    trainer = ClippingTrainer(
        net, loss_func=loss_func, optimizer=make_optimizer(net), gradient_accumulation_steps=3, default_callbacks=()
    )
    history = trainer.train(make_data(48), max_steps=1, per_device_batch_size=8)
    assert history.steps[0].loss == pytest.approx(sum(float(loss.detach()) for loss in seen) / 3, rel=1e-6)


def test_a_second_run_restarts_its_schedule() -> None:
    net = make_net()
    trainer = FullTrainer(
        net,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=make_optimizer(net),
        create_scheduler=lambda optimizer, plan: OneCycleLR(optimizer, 0.05, total_steps=plan.total_steps),
        default_callbacks=(),
    )
    before = copy.deepcopy(trainer.optimizer.param_groups[0] | {"params": None})
    rates = [[s.learning_rate for s in trainer.train(make_data(48), num_epochs=2).steps] for _ in range(2)]
    assert rates[0] == rates[1]
    assert trainer.optimizer.param_groups[0] | {"params": None} == before


class MatchesDerivatives(Trainer):
    """Has a loss of the model's derivatives with respect to its inputs."""

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        outputs = self.model(batch[0])
        return StepOutput(loss=derivative_loss(outputs, *batch), outputs=outputs)


def derivative_loss(outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    (slopes,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
    return nn.functional.cross_entropy(outputs, targets) + slopes.square().mean()


@pytest.mark.parametrize("part", [range(48), [5, 3, 40, 7, 8, 9, 1, 2, 30, 31, 32, 33, 0, 47, 46, 45]])
def test_derivatives_by_inputs_that_require_a_gradient_equal_those_of_a_plain_loop(part: Sequence[int]) -> None:
    plain_net, net, full = make_net().eval(), make_net(), make_data(48)
    full.tensors[0].requires_grad_()
    data, optimizer = Subset(full, part), make_optimizer(plain_net)
    for inputs, targets in DataLoader(data, batch_size=BATCH):
        derivative_loss(plain_net(inputs), inputs, targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    net.get_submodule("1").eval()
    parts: dict[str, Any] = {"optimizer": make_optimizer(net), "loss_func": nn.MSELoss(), "default_callbacks": ()}
    MatchesDerivatives(net, **parts).train(DataLoader(data, batch_size=BATCH), num_epochs=1)
    assert torch.equal(get_weights(net), get_weights(plain_net))
