"""Optimizers that step by a closure: as in a plain loop, whatever the split of a step into batches and processes."""

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_
from torch.optim import LBFGS, SGD, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import TensorDataset
from torchmetrics import SumMetric
from typing_extensions import override

from ptacc import (
    Callback,
    CheckpointMixin,
    ClosureMixin,
    DDPMixin,
    EMAMixin,
    GradAccumMixin,
    GradClipMixin,
    LRSchedulerMixin,
    MetricsMixin,
    MultiUpdateLoop,
    OptimizerDict,
    Pair,
    SeedMixin,
    StepOutput,
    StepResult,
    Steps,
    Trainer,
)
from ptacc.engines.default import TorchEngine
from ptacc.errors import CompositionError, DataError, OptionError
from ptacc.protocols import Engine
from tests.ranks import run_ranks

SAMPLES, STEP, LENGTH = 144, 72, 10
"""Sine waves, of which a step takes half: a number that 1 to 4 batches on 1 to 3 processes divide evenly."""


class Sequence(nn.Module):
    """Predicts the next values of waves: https://github.com/pytorch/examples/tree/main/time_sequence_prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm1, self.lstm2, self.linear = nn.LSTMCell(1, 5), nn.LSTMCell(5, 5), nn.Linear(5, 1)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        first = second = None
        outputs = []
        for value in torch.split(inputs, 1, dim=1):
            first = self.lstm1(value, first)
            second = self.lstm2(first[0], second)
            outputs.append(self.linear(second[0]))
        return torch.cat(outputs, dim=1)


class SAM(Optimizer):
    """As in https://github.com/davda54/sam: the gradients are there before `step`, and its closure is optional."""

    def __init__(self, params: Iterable[Any], base_optimizer: type[SGD], rho: float = 0.05, **kwargs: Any) -> None:
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def perturb(self) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            self.state[p]["old_p"] = p.data.clone()
            p.data.add_(p.grad * self.param_groups[0]["rho"] / (norm + 1e-12))  # torch does not count this change

    @override
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.perturb()
        torch.enable_grad()(closure)()
        for parameter, state in self.state.items():
            parameter.data = state["old_p"]
        self.base_optimizer.step()

    @override
    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups


class ClosureFirstSAM(SGD):
    """As in https://github.com/moskomule/sam.pytorch: `step` calls its closure twice."""

    @override
    @torch.no_grad()
    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure = torch.enable_grad()(closure)
        closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        moves = [p.grad * 0.05 / norm for p in parameters]
        for parameter, move in zip(parameters, moves, strict=True):
            parameter.add_(move)
        closure()
        for parameter, move in zip(parameters, moves, strict=True):
            parameter.sub_(move)
        super().step()


MakeOptimizer = Callable[[nn.Module], Optimizer]
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "lbfgs": lambda model: LBFGS(model.parameters(), lr=0.5, max_iter=4),
    "strong_wolfe": lambda model: LBFGS(model.parameters(), lr=0.8, max_iter=3, line_search_fn="strong_wolfe"),
    "sam": lambda model: SAM(model.parameters(), SGD, lr=0.1),
    "closure_first_sam": lambda model: ClosureFirstSAM(model.parameters(), lr=0.1, momentum=0.9),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


class Loop(ClosureMixin, SeedMixin, GradAccumMixin, GradClipMixin, LRSchedulerMixin, Trainer): ...


def make_data() -> TensorDataset:
    phases = torch.linspace(0, 6, SAMPLES, dtype=torch.float64)[:, None]
    waves = torch.sin(phases + torch.arange(LENGTH + 1) / 2)
    return TensorDataset(waves[:, :-1], waves[:, 1:])


def make_parts(name: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = Sequence().double()
    parts = {"optimizer": OPTIMIZERS[name](model), "loss_func": nn.MSELoss(), "seed": 0, "default_callbacks": ()}
    return model, {"create_scheduler": lambda optimizer, _: StepLR(optimizer, 3, gamma=0.5), **parts}


def train(
    name: str, kind: type[Trainer] = Loop, batch: int = STEP, steps: int = 5, **options: Any
) -> dict[str, Tensor]:
    model, parts = make_parts(name)
    trainer = kind(model, **parts, **options)
    trainer.train(make_data(), max_steps=steps, per_device_batch_size=batch)
    losses = [step.loss for step in trainer.history.steps]
    return {**model.state_dict(), "losses": torch.tensor(losses, dtype=torch.float64)}


def read_batches(steps: int) -> list[Pair]:
    """Return the batches of whole steps that a trainer is given."""
    seen: list[Pair] = []

    class Reading(Loop):
        @override
        def train_step(self, batch: Pair) -> StepOutput[Tensor]:
            seen.append(batch)
            return super().train_step(batch)

    train("sam", Reading, steps=steps)
    return seen[::2]


def train_plainly(name: str, max_norm: float | None = None) -> tuple[nn.Module, list[float]]:
    """Return the model, and the losses at the start of each step."""
    model, parts = make_parts(name)
    optimizer = parts["optimizer"]
    scheduler, losses = StepLR(optimizer, 3, gamma=0.5), []
    for inputs, targets in read_batches(5):

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            optimizer.zero_grad()
            loss = mse_loss(model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            if max_norm is not None:
                clip_grad_norm_(model.parameters(), max_norm)
            return loss

        losses.append(closure().item())
        optimizer.step(closure)
        scheduler.step()
    return model, losses


@every_optimizer
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_weights_and_losses_are_those_of_a_plain_loop_to_the_last_bit(name: str, max_norm: float | None) -> None:
    model, losses = train_plainly(name, max_norm)
    state = train(name, max_grad_norm=max_norm)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert state["losses"].tolist() == losses


class Wrapped(DDPMixin, Loop): ...


@every_optimizer
@pytest.mark.parametrize(("kind", "ranks"), [(Loop, 1), (Loop, 2), (Loop, 3), (Wrapped, 2)])
@pytest.mark.timeout(120)
def test_the_split_of_a_step_makes_no_difference(name: str, kind: type[Trainer], ranks: int) -> None:
    def split() -> list[dict[str, Tensor]]:
        accumulated = [1, 2, 3, 4]
        return [train(name, kind, STEP // (ranks * n), gradient_accumulation_steps=n) for n in accumulated]

    expected = train(name)
    for states in run_ranks(split, ranks) if ranks > 1 else [split()]:
        for state in states:
            torch.testing.assert_close(state, expected, rtol=1e-12, atol=1e-12)


class Saving(CheckpointMixin, Loop): ...


@every_optimizer
@pytest.mark.parametrize("step", range(1, 5))
def test_a_run_resumes_from_every_step(name: str, step: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint_dir": tmp_path, "checkpoint_every": Steps(1)}
    train(name, Saving, steps=step, **options)
    resumed = train(name, Saving, resume=True, **options)
    assert all(torch.equal(resumed[key], value) for key, value in train(name).items())


# ---- what repeated calls of the closure do


class Recording(MetricsMixin[Pair, Tensor], Loop):
    """Records the random numbers of each call by step, and the calls of hooks."""

    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        self.draws: dict[int, list[tuple[float, float, float]]] = {}
        self.batches_ended = 0

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        numbers = random.random(), np.random.random_sample(), torch.rand(()).item()  # noqa: NPY002
        self.draws.setdefault(self.progress.steps, []).append(numbers)
        return super().train_step(batch)

    @override
    def on_batch_end(self, batch: Pair, output: StepOutput[Tensor]) -> None:
        super().on_batch_end(batch, output)
        self.batches_ended += 1

    @override
    def update_metrics(self, batch: Pair, output: StepOutput[Tensor], metrics: Iterable[Any]) -> None:
        for metric in metrics:
            metric.update(len(batch[0]))


def record(name: str, model: nn.Module | None = None, **options: Any) -> Recording:
    """Train two steps of two batches each."""
    own, parts = make_parts(name)
    if model is not None:
        own, parts["optimizer"] = model, OPTIMIZERS[name](model)
    trainer = Recording(own, **parts, gradient_accumulation_steps=2, **options)
    trainer.train(make_data(), num_epochs=1, per_device_batch_size=STEP // 2)
    return trainer


@every_optimizer
def test_random_numbers_are_the_same_in_each_call_of_a_step(name: str) -> None:
    first, second = record(name).draws.values()
    assert len(first) >= 4
    assert len(second) >= 4
    assert (len(set(first)), len(set(second)), len({*first, *second})) == (2, 2, 4)


def test_after_a_step_generators_are_as_after_one_call() -> None:
    first, *others = [list(record(name).draws.values()) for name in OPTIMIZERS]
    assert all([set(step) for step in draws] == [set(step) for step in first] for draws in others)


def test_metrics_and_batch_ends_are_those_of_the_first_call() -> None:
    trainer = record("strong_wolfe", train_metrics={"samples": SumMetric()})
    assert trainer.batches_ended == 4
    assert trainer.history[-1].train_metrics["samples"] == SAMPLES


@pytest.mark.parametrize(("name", "calls"), [("lbfgs", None), ("sam", 4), ("closure_first_sam", 4)])
def test_gradients_are_computed_as_often_as_in_a_plain_loop(name: str, calls: int | None) -> None:
    trainer = record(name)
    state = trainer.optimizer.state[next(trainer.model.parameters())]
    assert sum(map(len, trainer.draws.values())) == 2 * (calls or state["func_evals"])


class ChangingBatches(Loop):
    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        batch[0].mul_(0.5)
        return super().train_step(batch)


def test_a_batch_that_is_changed_in_place_is_refused_if_it_is_needed_again() -> None:
    model, options = make_parts("lbfgs")
    with pytest.raises(DataError, match=r"train_step changed a batch in place.*`inputs = inputs \* 0\.5`"):
        ChangingBatches(model, **options).train(make_data(), num_epochs=1)


def test_buffers_are_updated_once_a_step() -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(LENGTH, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, LENGTH)).double()

    record("lbfgs", model := make(), max_grad_norm=1e-30)  # the weights stay where they are
    expected = make()
    for start in range(0, SAMPLES, STEP // 2):
        expected(make_data()[start : start + STEP // 2][0])
    torch.testing.assert_close(model[1].num_batches_tracked, expected[1].num_batches_tracked)
    torch.testing.assert_close(model[1].running_mean, expected[1].running_mean)


def test_clipping_reports_the_norm_of_the_first_call() -> None:
    model, parts = make_parts("lbfgs")
    inputs, targets = make_data().tensors
    mse_loss(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
    norm = clip_grad_norm_(model.parameters(), 1.0).item()
    trainer = Loop(model, **parts, max_grad_norm=0.01)
    (step,) = trainer.train(make_data(), max_steps=1, per_device_batch_size=SAMPLES).steps
    assert step.logged["grad_norm"] == pytest.approx(norm, rel=1e-12)


class Averaging(EMAMixin, Loop): ...


def test_an_average_is_updated_once_a_step() -> None:
    seen: list[Tensor] = []

    class Weights(Callback[Averaging]):
        @override
        def on_step_end(self, trainer: Averaging, step: StepResult) -> None:
            seen.append(next(trainer.model.parameters()).detach().clone())

    model, parts = make_parts("strong_wolfe")
    average = next(model.parameters()).detach().clone()
    trainer = Averaging(model, **parts, ema_decay=0.5, callbacks=[Weights()])
    trainer.train(make_data(), max_steps=4, per_device_batch_size=STEP)
    for weights in seen:
        average = 0.5 * average + 0.5 * weights
    with trainer.averaged_weights():
        torch.testing.assert_close(next(model.parameters()).detach(), average)


# ---- what has no closure


class Scaled(Loop):
    @override
    def make_engine(self) -> Engine:
        scaler = torch.amp.GradScaler("cpu")
        return TorchEngine(self.accelerator, self.unwrapped_model, self.optimizer_slots(), scaler)


def test_a_gradient_scaler_is_refused() -> None:
    with pytest.raises(OptionError, match=r"no gradient scaler.*bf16 in place of fp16"):
        train("lbfgs", Scaled)


def test_several_optimizers_are_refused() -> None:
    model, parts = make_parts("sam")
    halves = OptimizerDict({name: SGD(child.parameters()) for name, child in model.named_children()})
    given: dict[str, Any] = {**parts, "optimizer": halves}
    with pytest.raises(OptionError, match="several optimizers cannot step by one closure"):
        Loop(model, **given)


def test_a_loop_with_several_updates_is_refused() -> None:
    class Alternating(ClosureMixin, MultiUpdateLoop[Pair, Tensor]):
        @override
        def train_updates(self, batch: Pair) -> Any: ...

    model = nn.Linear(1, 1)
    with pytest.raises(CompositionError, match=r"a MultiUpdateLoop has no closure of its step"):
        Alternating(model, optimizer=SGD(model.parameters()))
