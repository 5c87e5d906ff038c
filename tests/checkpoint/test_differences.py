"""What differs between a checkpoint and a trainer is refused by name, can be ignored, or is warned of."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler
from typing_extensions import override

from ptacc import (
    Callback,
    CheckpointMixin,
    CompileMixin,
    EMAMixin,
    LRSchedulerMixin,
    RestoreBestWeights,
    RunPlan,
    SeedMixin,
    Steps,
    Trainer,
    TrainerCore,
)
from ptacc.core.module_options import module_options
from ptacc.errors import CheckpointError, OptionError
from ptacc.types.aliases import CompileBackend
from tests.ranks import run_ranks


class Saving(CheckpointMixin, SeedMixin, Trainer):
    seed: int | None = 5


def net(width: int = 8, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, width), nn.Linear(width, 2)).to(dtype)


def make(directory: Path, kind: type[Saving] = Saving, model: nn.Module | None = None, **options: Any) -> Saving:
    model = net() if model is None else model
    parts: dict[str, Any] = {"optimizer": Adam(model.parameters(), lr=0.1), "checkpoint_dir": directory, **options}
    parts = {"loss_func": nn.CrossEntropyLoss(), "default_callbacks": (), **parts}
    return kind(model, **parts)


def samples(count: int) -> TensorDataset:
    torch.manual_seed(count)
    return TensorDataset(torch.randn(count, 4), torch.randint(2, (count,)))


def train(trainer: Saving, data: Any = None, **options: Any) -> Saving:
    """Train on 24 samples: three steps an epoch."""
    given: dict[str, Any] = {
        "num_epochs": 1,
        **({} if isinstance(data, DataLoader) else {"per_device_batch_size": 8}),
        **options,
    }
    trainer.train(samples(24) if data is None else data, **given)
    return trainer


def resume(
    directory: Path, kind: type[Saving] = Saving, /, data: Any = None, epochs: int = 2, **options: Any
) -> Saving:
    return train(make(directory, kind, **options, resume=True), data, num_epochs=epochs)


# ---- what can be ignored


def test_a_model_of_another_width_resumes_with_the_tensors_that_fit(tmp_path: Path) -> None:
    saved = train(make(tmp_path))
    wide = net(16)
    fresh = {name: tensor.clone() for name, tensor in wide.state_dict().items()}
    trainer = resume(tmp_path, model=wide, epochs=1, resume_ignore={"model"})
    first = saved.model.state_dict()
    for name, tensor in wide.state_dict().items():
        assert torch.equal(tensor, first[name] if tensor.shape == first[name].shape else fresh[name]), name
    states = trainer.optimizer.state
    assert [p in states for p in wide.parameters()] == [True, True, False, False, False, True]


def test_a_model_of_another_width_trains_on(tmp_path: Path) -> None:
    train(make(tmp_path))
    trainer = resume(tmp_path, model=net(16), resume_ignore={"model"})
    assert trainer.progress.steps == 6
    assert trainer.optimizer.state[trainer.model[1].weight]["exp_avg"].shape == (16, 8)  # type: ignore[index]


def test_a_pattern_ignores_some_tensors_only(tmp_path: Path) -> None:
    train(make(tmp_path))
    with pytest.raises(CheckpointError, match=r"(?s)the model's 1.bias is float32 \(16,\)(?!.*2.weight)"):
        resume(tmp_path, model=net(16), resume_ignore={"model.2", "model.*.weight"})
    resume(tmp_path, model=net(16), resume_ignore={"model.1", "model.2.weight"})


def test_a_model_of_another_dtype_resumes_with_the_saved_values(tmp_path: Path) -> None:
    saved = train(make(tmp_path)).model.state_dict()
    trainer = resume(tmp_path, model=net(dtype=torch.float64), epochs=1, resume_ignore={"model"})
    assert torch.equal(trainer.model.state_dict()["0.weight"], saved["0.weight"].double())


def test_averages_of_a_model_of_another_width_are_named(tmp_path: Path) -> None:
    class Averaging(EMAMixin, Saving):
        ema_decay: float = 0.5

    train(make(tmp_path, Averaging))
    with pytest.raises(CheckpointError, match=r"(?s)the average of 1.bias.*resume_ignore=\{'ema'\}"):
        resume(tmp_path, Averaging, model=net(16), resume_ignore={"model"})
    assert resume(tmp_path, Averaging, model=net(16), resume_ignore={"model", "ema"}).progress.steps == 6


def test_averages_that_were_not_saved_start_from_the_loaded_weights(tmp_path: Path) -> None:
    class Averaging(EMAMixin, Saving):
        ema_decay: float = 0.999

    saved = train(make(tmp_path)).model.state_dict()
    trainer = resume(tmp_path, Averaging, model=net(), epochs=1, resume_ignore={"ema"})
    assert isinstance(trainer, Averaging)
    with trainer.averaged_weights():
        assert all(torch.equal(tensor, saved[name]) for name, tensor in trainer.model.state_dict().items())


def test_another_optimizer_starts_without_a_state(tmp_path: Path) -> None:
    train(make(tmp_path))
    model = net()
    with pytest.raises(CheckpointError, match=r"optimizer was 'torch.optim.adam.Adam' and is 'torch.optim.sgd.SGD'"):
        resume(tmp_path, model=model, optimizer=SGD(model.parameters(), lr=0.2))
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)
    resume(tmp_path, model=model, optimizer=optimizer, resume_ignore={"optimizer"})
    assert optimizer.param_groups[0]["lr"] == 0.2
    assert all(set(state) == {"momentum_buffer"} for state in optimizer.state.values())


def split_groups(model: nn.Module) -> Optimizer:
    first, *others = model.parameters()
    return Adam([{"params": [first]}, {"params": others}], lr=0.1)


def test_other_groups_are_refused_before_any_weight_is_changed(tmp_path: Path) -> None:
    train(make(tmp_path))
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make(tmp_path, model=model, optimizer=split_groups(model), resume=True)
    for refused in (lambda: train(trainer, num_epochs=2), lambda: trainer.load_checkpoint(tmp_path)):
        with pytest.raises(CheckpointError, match=r"group 0 of the optimizer holds 0.weight, and no group of the"):
            refused()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert resume(tmp_path, model=model, optimizer=split_groups(model), resume_ignore={"optimizer"}).progress.steps == 6


# ---- what was not noticed


def test_a_mixin_that_is_taken_away_is_named(tmp_path: Path) -> None:
    class Compiled(CompileMixin, Saving):
        compile_backend: CompileBackend | None = "eager"

    train(make(tmp_path, Compiled))
    with pytest.raises(CheckpointError, match="compiled was 'eager, default' and is not set"):
        resume(tmp_path)
    resume(tmp_path, resume_ignore={"compiled"})


@pytest.mark.parametrize("setting", [{"lr": 0.01}, {"weight_decay": 0.5}, {"betas": (0.8, 0.9)}])
def test_other_settings_of_the_optimizer_are_those_of_the_saved_run_and_a_warning_says_so(
    tmp_path: Path, setting: dict[str, Any]
) -> None:
    saved = train(make(tmp_path)).optimizer.param_groups[0]
    model = net()
    settings: dict[str, Any] = {"lr": 0.1, **setting}
    optimizer = Adam(model.parameters(), **settings)
    (name,) = setting
    with pytest.warns(UserWarning, match=f"resumes with the settings of the saved run: optimizer.{name}="):
        resume(tmp_path, model=model, optimizer=optimizer)
    assert optimizer.param_groups[0][name] == saved[name]


def test_other_settings_can_be_set_when_the_checkpoint_is_loaded(tmp_path: Path) -> None:
    class Slower(Callback[TrainerCore]):
        @override
        def on_load(self, trainer: TrainerCore, path: str) -> None:
            trainer.optimizer.param_groups[0]["lr"] = 0.01

    train(make(tmp_path))
    trainer = resume(tmp_path, callbacks=[Slower()])
    assert [step.learning_rate for step in trainer.history.steps] == [0.1] * 3 + [0.01] * 3


def decayed(optimizer: Optimizer, plan: RunPlan) -> StepLR:
    return StepLR(optimizer, 2)


def cosine(optimizer: Optimizer, plan: RunPlan) -> CosineAnnealingLR:
    return CosineAnnealingLR(optimizer, plan.total_steps)


class Scheduled(LRSchedulerMixin, Saving):
    pass


def test_settings_that_a_scheduler_changed_are_no_difference(tmp_path: Path) -> None:
    train(make(tmp_path, Scheduled, create_scheduler=decayed))
    resume(tmp_path, Scheduled, create_scheduler=decayed)


def test_another_scheduler_is_named(tmp_path: Path) -> None:
    train(make(tmp_path, Scheduled, create_scheduler=decayed))
    with pytest.raises(
        CheckpointError, match=r"(?s)scheduler was a StepLR and is a CosineAnnealingLR.*\{'scheduler'\}"
    ):
        resume(tmp_path, Scheduled, create_scheduler=cosine)
    resume(tmp_path, Scheduled, create_scheduler=cosine, resume_ignore={"scheduler"})


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(samples(23), batch_size=8, **options)


def sampler(weight: float) -> WeightedRandomSampler:
    return WeightedRandomSampler([weight] * 12 + [1.0] * 11, 23)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"shuffle": True}, {"shuffle": False}),
        ({"shuffle": True}, {"sampler": sampler(2.0)}),
        ({"sampler": sampler(2.0)}, {"sampler": sampler(3.0)}),
        ({"drop_last": False}, {"drop_last": True}),
    ],
)
def test_another_order_of_the_data_is_refused_within_an_epoch(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    train(make(tmp_path), loader(**before), max_steps=2)
    with pytest.raises(CheckpointError, match=r"within an epoch whose data was in the order of .*Sampler"):
        resume(tmp_path, data=loader(**after), resume_ignore={"data"})
    resume(tmp_path, data=loader(**before))


def test_another_order_of_the_data_is_warned_of_between_epochs(tmp_path: Path) -> None:
    train(make(tmp_path), loader(shuffle=True))
    with pytest.warns(UserWarning, match="The order of the data was RandomSampler.*, and is SequentialSampler"):
        resume(tmp_path, data=loader())


class Counting(Callback[object]):
    """Counts steps from a start."""

    def __init__(self, count: int, key: str = "") -> None:
        self.count, self.key = count, key

    @override
    def state_key(self) -> str:
        return self.key

    @override
    def on_step_end(self, trainer: object, step: object) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.count = state_dict["count"]


def test_callbacks_in_another_order_keep_their_states(tmp_path: Path) -> None:
    train(make(tmp_path, callbacks=[Counting(0, "first"), Counting(100, "second")]))
    again = [Counting(0, "second"), Counting(0, "first")]
    resume(tmp_path, callbacks=again)
    assert [callback.count for callback in again] == [106, 6]


def test_callbacks_of_one_class_are_distinguished_by_what_they_monitor(tmp_path: Path) -> None:
    def best(*names: str) -> list[RestoreBestWeights]:
        return [RestoreBestWeights(name, restore=False) for name in names]

    first = best("train_loss", "eval_loss")
    make(tmp_path, callbacks=first).train(samples(24), samples(8), num_epochs=1, per_device_batch_size=8)
    again = best("eval_loss", "train_loss")
    trainer = make(tmp_path, callbacks=again, resume=True)
    trainer.train(samples(24), samples(8), num_epochs=1, per_device_batch_size=8)
    assert [callback.best_value for callback in again] == [callback.best_value for callback in reversed(first)]


def test_callbacks_that_cannot_be_distinguished_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="two callbacks are a Counting with the state_key ''"):
        train(make(tmp_path, callbacks=[Counting(0), Counting(1)]))


# ---- states that were not saved


class Centred(nn.Module):
    """A loss with a running mean in a buffer, as DINO's has."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(()))

    @override
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.mean.lerp_(outputs.detach().mean(), 0.3)
        return nn.functional.cross_entropy(outputs - self.mean * outputs, targets)


class Remembering(nn.Module):
    """A layer with buffers that are not persistent: it changes one, replaces another, and registers a third."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.seen: Tensor
        self.first: Tensor
        self.register_buffer("mean", torch.zeros(4), persistent=False)
        self.register_buffer("seen", torch.zeros(0), persistent=False)
        self.register_buffer("constant", torch.eye(2).to_sparse(), persistent=False)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(inputs.mean(0), 0.1)
            self.seen = torch.cat([self.seen, inputs.mean().reshape(1)])
            if not hasattr(self, "first"):
                self.register_buffer("first", inputs[0].clone(), persistent=False)
        return inputs - self.mean - self.seen.mean() * self.first


def centred(directory: Path, **options: Any) -> Tensor:
    trainer = make(directory, loss_func=Centred(), checkpoint_every=Steps(1), resume=True)
    return torch.cat([p.flatten() for p in train(trainer, **options).unwrapped_model.parameters()])


def test_buffers_of_a_loss_are_resumed(tmp_path: Path) -> None:
    expected = centred(tmp_path / "whole")
    centred(tmp_path / "run", max_steps=2)
    assert torch.equal(centred(tmp_path / "run"), expected)


def test_buffers_of_a_loss_are_resumed_on_each_of_two_processes(tmp_path: Path) -> None:
    def both() -> bool:
        expected = centred(tmp_path / "whole")
        centred(tmp_path / "run", max_steps=1)
        return torch.equal(centred(tmp_path / "run"), expected)

    assert run_ranks(both, 2) == [True, True]


def test_the_model_is_not_among_the_options_that_are_saved(tmp_path: Path) -> None:
    class Finding(Saving):
        @override
        def on_run_end(self) -> None:
            super().on_run_end()
            assert module_options(self).keys() == {"loss_func"}  # the model is wrapped here

    assert run_ranks(lambda: train(make(tmp_path, Finding)).progress.steps, 2)


def test_buffers_that_are_not_persistent_are_resumed(tmp_path: Path) -> None:
    def run(name: str, **options: Any) -> dict[str, Tensor]:
        model = nn.Sequential(Remembering(), net())
        trainer = train(make(tmp_path / name, model=model, resume=True), **options)
        return {**dict(trainer.model.named_parameters()), **dict(trainer.model.named_buffers())}

    expected = run("whole")
    run("run", max_steps=1)
    found = run("run")
    assert found.keys() == expected.keys()
    del found["0.constant"], expected["0.constant"]  # a sparse tensor, which is not saved
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_module_among_the_options_that_differs_is_named(tmp_path: Path) -> None:
    train(make(tmp_path, loss_func=nn.CrossEntropyLoss(torch.ones(2))))
    other = nn.CrossEntropyLoss(torch.ones(2, dtype=torch.float64))
    with pytest.raises(CheckpointError, match=r"(?s)the loss_func's weight is float64 \(2,\).*\{'options'\}"):
        resume(tmp_path, loss_func=other)


def test_a_module_among_the_options_keeps_the_tensors_that_were_not_saved(tmp_path: Path) -> None:
    train(make(tmp_path))
    loss_func = nn.CrossEntropyLoss(torch.tensor([1.0, 3.0]))
    assert resume(tmp_path, loss_func=loss_func, resume_ignore={"options"}).progress.steps == 6
    assert loss_func.weight is not None
    assert loss_func.weight.tolist() == [1.0, 3.0]


def test_an_unchanged_trainer_resumes_without_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(make(tmp_path), max_steps=2)
        resume(tmp_path)
