"""Optimizers with modes: trained in train mode, used in eval mode, and neither evaluations nor saves change a run."""

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from schedulefree import AdamWScheduleFree, SGDScheduleFree
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.optim import SGD
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import (
    Callback,
    CheckpointMixin,
    EMAMixin,
    FSDPMixin,
    GradAccumMixin,
    LRSchedulerMixin,
    OptimizerDict,
    RestoreBestWeights,
    SeedMixin,
    Steps,
    TensorParallelMixin,
    Trainer,
)
from ptacc.cli import main
from ptacc.tuning import find_batch_size, find_learning_rate
from tests.ranks import run_ranks

SAMPLES, STEPS = 24, 6
State = dict[str, Tensor]


class Regression(SeedMixin, GradAccumMixin, Trainer):
    seed: int | None = 0


class Saving(CheckpointMixin, Regression): ...


def make_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, inputs.square().mean(dim=1, keepdim=True))


def make_parts() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    return model, AdamWScheduleFree(model.parameters(), lr=0.02, warmup_steps=3, weight_decay=0.1)


def make(kind: type[Trainer] = Regression, **options: Any) -> Any:
    model, optimizer = make_parts()
    return kind(model, loss_func=nn.MSELoss(), optimizer=optimizer, default_callbacks=(), **options)


def train(trainer: Any, steps: int = STEPS, batch_size: int = 6, **options: Any) -> State:
    trainer.train(make_data(), max_steps=steps, per_device_batch_size=batch_size, **options)
    return get_state(trainer.model, trainer.optimizer)


def get_state(model: nn.Module, optimizer: Any) -> State:
    """Return the weights in eval mode, and the state of the optimizer."""
    moments = [optimizer.state.get(p, {}) for p in model.parameters()]
    states = {f"{key}.{i}": value for i, state in enumerate(moments) for key, value in state.items()}
    return {name: value.clone() for name, value in {**model.state_dict(), **states}.items()}


def read_batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    seen: list[tuple[Tensor, Tensor]] = []

    class Reading(Regression):
        @override
        def train_step(self, batch: tuple[Tensor, Tensor]) -> Any:
            seen.append(batch)
            return super().train_step(batch)

    train(make(Reading), steps)
    return seen


def train_plainly(model: nn.Module, optimizer: Any, batches: list[tuple[Tensor, Tensor]]) -> None:
    optimizer.train()
    for inputs, targets in batches:
        nn.functional.mse_loss(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    optimizer.eval()


def assert_same(state: State, expected: State) -> None:
    assert state.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(state[name], value)] == []


# ---- the numbers


def test_a_run_ends_with_the_weights_of_a_plain_loop_in_eval_mode() -> None:
    model, optimizer = make_parts()
    train_plainly(model, optimizer, read_batches(STEPS))
    trainer = make()
    assert_same(train(trainer), get_state(model, optimizer))
    assert [group["train_mode"] for group in trainer.optimizer.param_groups] == [False]


def test_a_second_run_continues_like_a_second_plain_loop() -> None:
    model, optimizer = make_parts()
    for _ in range(2):
        train_plainly(model, optimizer, read_batches(STEPS))
    trainer = make()
    train(trainer)
    assert_same(train(trainer), get_state(model, optimizer))


@pytest.mark.parametrize(("ranks", "accumulated"), [(1, 2), (1, 3), (2, 1), (2, 3), (3, 1), (3, 2)])
def test_the_split_of_a_step_makes_no_difference(ranks: int, accumulated: int) -> None:
    expected, size = train(make()), 6 // (ranks * accumulated)

    def split() -> State:
        return train(make(gradient_accumulation_steps=accumulated), batch_size=size)

    for state in run_ranks(split, ranks) if ranks > 1 else [split()]:
        torch.testing.assert_close(state, expected, rtol=1e-12, atol=1e-12)


class Sharding(FSDPMixin, Saving): ...


class Splitting(TensorParallelMixin, Saving):
    tensor_parallel_size: int | None = 2
    tensor_parallel_plan: Mapping[str, Any] | None = field(
        default_factory=lambda: {"0": ColwiseParallel(), "2": RowwiseParallel()}
    )


@pytest.mark.parametrize(("kind", "batch_size"), [(Sharding, 3), (Splitting, 6)])
def test_a_sharded_run_has_the_numbers_of_one_process_and_resumes(
    kind: type[Saving], batch_size: int, tmp_path: Path
) -> None:
    expected = train(make())

    def sharded() -> State:
        options: dict[str, Any] = {"checkpoint_dir": tmp_path, "checkpoint_every": Steps(1)}
        train(make(kind, **options), 3, batch_size=batch_size)
        return train(make(kind, resume=True, **options), batch_size=batch_size)

    for state in run_ranks(sharded, 2):
        torch.testing.assert_close(state, expected, rtol=1e-12, atol=1e-12)


# ---- evaluations and checkpoints


def test_evaluations_and_checkpoints_do_not_change_a_run(tmp_path: Path) -> None:
    class Evaluates(Callback[Any]):
        @override
        def on_step_end(self, trainer: Any, step: Any) -> None:
            trainer.evaluate(make_data())
            trainer.export_model(tmp_path / "in-run.safetensors", overwrite=True)

    options: dict[str, Any] = {"checkpoint_dir": tmp_path, "checkpoint_every": Steps(1), "callbacks": [Evaluates()]}
    state = train(make(Saving, **options), eval_dataset=make_data(), evaluate_every=Steps(1))
    assert_same(state, train(make()))


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_run_resumes_from_every_step(step: int, in_background: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint_dir": tmp_path, "checkpoint_in_background": in_background}
    train(make(Saving, checkpoint_every=Steps(1), **options), step)
    assert_same(train(make(Saving, resume=True, **options)), train(make()))


def test_a_run_resumes_with_another_head(tmp_path: Path) -> None:
    train(make(Saving, checkpoint_dir=tmp_path), 3)
    trainer = make(Saving, checkpoint_dir=tmp_path, resume=True, resume_ignore={"model.2"})
    trainer.model[2] = nn.Linear(8, 2).double()
    trainer.optimizer = AdamWScheduleFree(trainer.model.parameters(), lr=0.02, warmup_steps=3, weight_decay=0.1)
    trainer.loss_func = lambda outputs, targets: (outputs - targets).square().mean()
    state = train(trainer)
    assert state["z.2"].shape == (2, 8)
    assert not torch.equal(state["z.0"], state["0.weight"])


def test_an_evaluation_uses_the_weights_of_eval_mode() -> None:
    trainer = make()
    train(trainer, 4, eval_dataset=make_data(), evaluate_every=Steps(2))
    model, optimizer = make_parts()
    train_plainly(model, optimizer, read_batches(4))
    inputs, targets = make_data().tensors
    expected = nn.functional.mse_loss(model(inputs), targets).item()
    assert trainer.history[-1].evaluations[""].loss == pytest.approx(expected, rel=1e-12)
    assert trainer.evaluate(make_data(), per_device_batch_size=6) == trainer.history[-1].evaluations[""]


def test_every_saved_file_has_the_weights_of_eval_mode(tmp_path: Path) -> None:
    class Exports(Callback[Any]):
        @override
        def on_epoch_end(self, trainer: Any, record: Any) -> None:
            trainer.export_model(tmp_path / "in-run.safetensors")

    trainer = make(Saving, checkpoint_dir=tmp_path / "run", callbacks=[Exports()])
    train(trainer, 4)
    trainer.export_model(tmp_path / "after.safetensors")
    main(["export", str(tmp_path / "run"), str(tmp_path / "command.safetensors")])
    for name in ("in-run", "after", "command"):
        assert_same(load_file(tmp_path / f"{name}.safetensors"), trainer.model.state_dict())


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_loaded_checkpoint_has_the_weights_of_eval_mode(weights_only: bool, tmp_path: Path) -> None:
    saved = make(Saving, checkpoint_dir=tmp_path)
    state = train(saved)
    loaded = make(Saving, checkpoint_dir=tmp_path / "other")
    loaded.load_checkpoint(tmp_path, weights_only=weights_only)
    assert_same(loaded.model.state_dict(), saved.model.state_dict())
    if not weights_only:
        assert_same(get_state(loaded.model, loaded.optimizer), state)
        assert_same(train(loaded), train(saved))


def test_the_best_weights_are_those_of_eval_mode() -> None:
    trainer = make(callbacks=[best := RestoreBestWeights("eval_loss", mode="max")])
    train(trainer, eval_dataset=make_data(), evaluate_every=Steps(1))
    model, optimizer = make_parts()
    train_plainly(model, optimizer, read_batches(best.best_step))
    assert_same(trainer.model.state_dict(), model.state_dict())


# ---- with others


class Failing(Callback[Any]):
    @override
    def on_step_end(self, trainer: Any, step: Any) -> None:
        if step.step == 4:
            raise KeyError("in step 4")


def test_a_run_that_fails_ends_in_eval_mode() -> None:
    trainer = make(callbacks=[Failing()])
    with pytest.raises(KeyError):
        train(trainer)
    assert_same(get_state(trainer.model, trainer.optimizer), train(make(), 4))


class Averaging(EMAMixin, Saving):
    ema_decay: float = 0.5


def test_averages_are_of_the_weights_of_train_mode_and_are_evaluated_themselves(tmp_path: Path) -> None:
    class Evaluates(Callback[Any]):
        @override
        def on_epoch_end(self, trainer: Any, record: Any) -> None:
            with trainer.averaged_weights():
                self.losses = [trainer.evaluate(make_data()).loss, record.evaluations[""].loss]

    trainer = make(Averaging, checkpoint_dir=tmp_path, callbacks=[callback := Evaluates()])
    assert_same(train(trainer, 4, eval_dataset=make_data()), train(make(), 4))
    assert callback.losses == [trainer.evaluate(make_data()).loss] * 2


class Scheduled(LRSchedulerMixin, Saving): ...


def test_a_schedule_restores_the_learning_rate_and_not_the_counts_of_the_optimizer(tmp_path: Path) -> None:
    options: dict[str, Any] = {"create_scheduler": lambda optimizer, _: LinearLR(optimizer, total_iters=4)}
    whole = make(Scheduled, checkpoint_dir=tmp_path / "whole", **options)
    expected, group = train(whole), whole.optimizer.param_groups[0]
    assert (group["k"], group["lr"], group["train_mode"]) == (STEPS, 0.02, False)
    assert group["weight_sum"] > 0
    train(make(Scheduled, checkpoint_dir=tmp_path / "run", **options, callbacks=[]), 3)
    assert_same(train(make(Scheduled, checkpoint_dir=tmp_path / "run", resume=True, **options)), expected)


def test_one_of_several_optimizers_may_have_modes(tmp_path: Path) -> None:
    def make_several(**options: Any) -> Any:
        model: Any = make_parts()[0]
        several = {"free": SGDScheduleFree(model[0].parameters(), lr=0.1), "plain": SGD(model[2].parameters(), lr=0.1)}
        return Saving(model, loss_func=nn.MSELoss(), optimizer=OptimizerDict(several), default_callbacks=(), **options)

    expected = train(make_several(checkpoint_dir=tmp_path / "whole"))
    train(make_several(checkpoint_dir=tmp_path / "run"), 3)
    assert_same(train(make_several(checkpoint_dir=tmp_path / "run", resume=True)), expected)


def test_searches_leave_the_weights_and_the_optimizer_as_they_were() -> None:
    trainer, data = make(), make_data()
    before = train(trainer)
    find_learning_rate(trainer, data, per_device_batch_size=6, steps=20)
    find_batch_size(trainer, data, global_batch_size=8)
    assert_same(get_state(trainer.model, trainer.optimizer), before)
    group = trainer.optimizer.param_groups[0]
    assert (group["k"], group["train_mode"]) == (STEPS, False)
