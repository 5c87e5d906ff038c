"""Losses with parameters: trained, averaged, saved and restored as the model is, on any number of processes."""

from dataclasses import field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Adam
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import (
    Callback,
    CheckpointMixin,
    DDPMixin,
    EMAMixin,
    EvalResult,
    FSDPMixin,
    GradAccumMixin,
    GradClipMixin,
    OptimizerDict,
    Pair,
    RestoreBestWeights,
    SeedMixin,
    StepOutput,
    StepResult,
    Steps,
    SWAMixin,
    TensorParallelMixin,
    Trainer,
)
from ptacc.errors import ModelError
from ptacc.tuning import find_learning_rate
from tests.ranks import run_ranks

CLASSES, FEATURES, SAMPLES, MAX_NORM = 3, 4, 24, 0.5


class Centres(nn.Module):
    """A softmax over cosines with class centres, with a learned temperature and a running mean of the embeddings."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(CLASSES, 5))
        self.temperature = nn.Parameter(torch.ones(()))
        self.register_buffer("mean", torch.zeros(5))
        self.modes: list[bool] = []

    @override
    def forward(self, embeddings: Tensor, targets: Tensor) -> Tensor:
        self.modes.append(self.training)
        if self.training:
            self.mean.lerp_(embeddings.detach().mean(0), 0.1)
        cosines = functional.normalize(embeddings) @ functional.normalize(self.centres).T
        return functional.cross_entropy(cosines * self.temperature.exp(), targets)


class Loop(SeedMixin, GradAccumMixin, GradClipMixin, Trainer): ...


def make_parts() -> tuple[nn.Module, Centres, TensorDataset]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    data = TensorDataset(torch.randn(SAMPLES, FEATURES).double(), torch.randint(CLASSES, (SAMPLES,)))
    return model, Centres().double(), data


def make_optimizer(model: nn.Module, loss: nn.Module) -> Adam:
    return Adam([*model.parameters(), *loss.parameters()], lr=0.02)


def train(kind: type[Loop], batch_size: int, steps: int = 8, *, evaluates: bool = False, **given: Any) -> Any:
    model, loss, data = make_parts()
    options: dict[str, Any] = {
        "optimizer": make_optimizer(model, loss),
        "seed": 0,
        "default_callbacks": (),
        "max_grad_norm": MAX_NORM,
    }
    trainer = kind(model, loss_func=loss, **options | given)
    trainer.train(data, data if evaluates else None, max_steps=steps, per_device_batch_size=batch_size)
    return trainer


def weights(trainer: Any) -> dict[str, Tensor]:
    losses = torch.tensor([step.loss for step in trainer.history.steps], dtype=torch.float64)
    state = {**trainer.model.state_dict(), **trainer.loss_func.state_dict(), "losses": losses}
    return {name: value for name, value in state.items() if name != "mean"}


def all_equal(state: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


def read_batches() -> list[Pair]:
    seen: list[Pair] = []

    class Reading(Loop):
        @override
        def train_step(self, batch: Pair) -> StepOutput[Tensor]:
            seen.append(batch)
            return super().train_step(batch)

    train(Reading, 6)
    return seen


def test_weights_are_those_of_a_plain_loop_to_the_last_bit() -> None:
    model, loss, _ = make_parts()
    optimizer = make_optimizer(model, loss)
    for inputs, targets in read_batches():
        loss(model(inputs), targets).backward()
        nn.utils.clip_grad_norm_([*model.parameters(), *loss.parameters()], MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    trained = train(Loop, 6)
    assert all_equal(trained.model.state_dict(), model.state_dict())
    assert all_equal(trained.loss_func.state_dict(), loss.state_dict())


class Wrapped(DDPMixin, Loop): ...


class Sharded(FSDPMixin, Loop): ...


class Split(TensorParallelMixin, Loop):
    tensor_parallel_plan: Any = field(default_factory=lambda: {"0": "colwise", "2": "rowwise"})


SPLITS = [(1, 3), (2, 1), (2, 3), (3, 2)]
"""Numbers of processes and of batches that a step consists of."""


@pytest.mark.parametrize(
    ("kind", "ranks", "accumulated"),
    [*((kind, *split) for kind in (Loop, Wrapped, Sharded) for split in SPLITS), (Split, 2, 1), (Split, 2, 3)],
)
def test_the_split_of_a_step_makes_no_difference(kind: type[Loop], ranks: int, accumulated: int) -> None:
    expected = weights(train(Loop, 6))
    size = 6 // (accumulated * (1 if kind is Split else ranks))

    def split() -> dict[str, Tensor]:
        return weights(train(kind, size, gradient_accumulation_steps=accumulated))

    for state in run_ranks(split, ranks) if ranks > 1 else [split()]:
        torch.testing.assert_close(state, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [Loop, Wrapped, Sharded])
def test_all_processes_start_with_the_weights_and_have_the_buffers_of_the_first_one(kind: type[Loop]) -> None:
    def of_rank() -> tuple[dict[str, Tensor], Tensor]:
        model, loss, data = make_parts()
        rank = Loop(model, loss_func=loss, optimizer=make_optimizer(model, loss)).distributed.rank
        nn.init.constant_(loss.temperature, rank)
        loss.mean += rank
        trainer = kind(model, loss_func=loss, optimizer=make_optimizer(model, loss), seed=0, default_callbacks=())
        trainer.train(data, num_epochs=1, per_device_batch_size=3)
        return weights(trainer), loss.mean

    (first, mean), (second, other_mean) = run_ranks(of_rank, 2)
    assert all_equal(first, second)
    assert torch.equal(mean, other_mean)


class Saving(CheckpointMixin, EMAMixin, Loop):
    ema_decay: float = 0.8


class SavingWrapped(DDPMixin, Saving): ...


class SavingSharded(FSDPMixin, Saving): ...


def resumed_and_whole(kind: type[Saving], step: int, directory: Path) -> bool:
    options: dict[str, Any] = {"checkpoint_every": Steps(1), "evaluates": True}
    whole = train(kind, 3, checkpoint_dir=directory / "whole", **options)
    train(kind, 3, step, checkpoint_dir=directory / "killed", **options)
    resumed = train(kind, 3, checkpoint_dir=directory / "killed", resume=True, **options)
    with whole.averaged_weights(), resumed.averaged_weights():
        is_equal = all_equal(weights(resumed), weights(whole))
    return is_equal and all_equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("step", range(1, 8))
def test_a_run_resumes_from_every_step(step: int, tmp_path: Path) -> None:
    assert resumed_and_whole(Saving, step, tmp_path)


@pytest.mark.parametrize("kind", [Saving, SavingWrapped, SavingSharded])
@pytest.mark.parametrize("step", [3, 5])
def test_a_run_of_several_processes_resumes(kind: type[Saving], step: int, tmp_path: Path) -> None:
    assert run_ranks(lambda: resumed_and_whole(kind, step, tmp_path), 2) == [True, True]


def test_loading_a_checkpoint_restores_the_loss(tmp_path: Path) -> None:
    trained = train(Saving, 6, checkpoint_dir=tmp_path, checkpoint_every=Steps(1))
    model, loss, data = make_parts()
    fresh = Saving(model, loss_func=loss, optimizer=make_optimizer(model, loss), checkpoint_dir=tmp_path / "other")
    fresh.load_checkpoint(tmp_path)
    assert torch.equal(loss.centres, trained.loss_func.centres)
    assert fresh.evaluate(data).loss == trained.evaluate(data).loss


def test_an_average_of_the_weights_includes_the_loss() -> None:
    model, loss, data = make_parts()
    expected = loss.centres.detach().clone()

    class Follow(Callback[Trainer]):
        @override
        def on_step_end(self, trainer: Trainer, step: StepResult) -> None:
            expected.lerp_(loss.centres.detach(), 1 - 0.8)

    class Averaging(EMAMixin, Trainer):
        ema_decay: float = 0.8

    options: dict[str, Any] = {"optimizer": make_optimizer(model, loss), "default_callbacks": ()}
    trainer = Averaging(model, loss_func=loss, callbacks=[Follow()], **options)
    trainer.train(data, num_epochs=2, per_device_batch_size=6)
    with trainer.averaged_weights():
        assert torch.equal(loss.centres, expected)
    assert not torch.equal(loss.centres, expected)


def test_swa_ends_with_the_average_of_the_loss() -> None:
    ends: list[Tensor] = []

    class Collect(Callback[Trainer]):
        @override
        def on_evaluation_end(self, trainer: Trainer, name: str, result: EvalResult) -> None:
            ends.append(getattr(trainer.loss_func, "centres").detach().clone())  # noqa: B009

    class Averaging(SWAMixin, Loop):
        swa_start: int | None = 1

    trainer = train(Averaging, 6, evaluates=True, callbacks=[Collect()])
    torch.testing.assert_close(trainer.loss_func.centres.detach(), (ends[0] + ends[1]) / 2)


def test_the_best_weights_include_those_of_the_loss() -> None:
    best = RestoreBestWeights("eval_loss", mode="max")  # the loss falls, so these are the first ones
    trainer = train(Loop, 6, evaluates=True, callbacks=[best])
    first = train(Loop, 6, 4)
    assert all_equal(trainer.loss_func.state_dict(), first.loss_func.state_dict())
    assert best.best_weights.keys() == trainer.model.state_dict().keys()


def test_a_loss_is_in_training_mode_in_steps_and_in_eval_mode_in_evaluations() -> None:
    model, loss, data = make_parts()
    trainer = Loop(model, loss_func=loss.eval(), optimizer=make_optimizer(model, loss), default_callbacks=())
    trainer.train(data, data, num_epochs=1, per_device_batch_size=12)
    assert loss.modes == [True, True, False, False]
    assert not loss.training


def test_a_loss_that_is_not_trained_keeps_its_mode() -> None:
    model, loss, data = make_parts()
    optimizer = Adam(model.parameters())
    Loop(model, loss_func=loss.eval(), optimizer=optimizer, default_callbacks=()).train(data, data, num_epochs=1)
    assert not any(loss.modes)


def test_an_optimizer_of_its_own_trains_the_loss() -> None:
    def split() -> dict[str, Tensor]:
        model, loss, data = make_parts()
        optimizers = OptimizerDict({"model": Adam(model.parameters(), lr=0.02), "loss": Adam(loss.parameters(), 0.02)})
        options: dict[str, Any] = {"seed": 0, "default_callbacks": (), "max_grad_norm": MAX_NORM}
        trainer = Loop(model, loss_func=loss, optimizer=optimizers, **options)
        trainer.train(data, max_steps=8, per_device_batch_size=3)
        return weights(trainer)

    for state in run_ranks(split, 2):
        torch.testing.assert_close(state, weights(train(Loop, 6)), rtol=1e-12, atol=1e-12)


def test_a_search_restores_the_loss() -> None:
    model, loss, data = make_parts()
    before = loss.centres.detach().clone()
    find_learning_rate(Loop(model, loss_func=loss, optimizer=make_optimizer(model, loss)), data, steps=10)
    assert torch.equal(loss.centres, before)


def test_parameters_of_a_loss_in_no_optimizer_are_named_in_a_warning() -> None:
    model, loss, data = make_parts()
    trainer = Loop(model, loss_func=loss, optimizer=Adam(model.parameters()), default_callbacks=())
    with pytest.warns(UserWarning, match=r"2 trainable .* options\.loss_func\.centres, options\.loss_func\.temperatur"):
        trainer.train(data, num_epochs=1)


def test_parameters_that_no_option_holds_are_refused() -> None:
    model, loss, data = make_parts()

    def hide(outputs: Tensor, targets: Tensor) -> Tensor:
        value: Tensor = loss(outputs, targets)
        return value

    trainer = Loop(model, loss_func=hide, optimizer=make_optimizer(model, loss), default_callbacks=())
    with pytest.raises(ModelError, match=r"2 of the optimizer's 6 parameters are not parameters of the model, nor of"):
        trainer.train(data, num_epochs=1)
