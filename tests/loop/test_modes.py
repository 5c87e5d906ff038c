"""Modes are changed by `train(mode)`, modules in eval mode stay in it, and a run starts without gradients."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from ptacc import (
    Cadence,
    Callback,
    CheckpointMixin,
    EMAMixin,
    EpochRecord,
    SeedMixin,
    StepOutput,
    StepResult,
    Steps,
    Trainer,
)
from ptacc.testing import tiny_data, tiny_parts
from ptacc.tuning import find_learning_rate

IN_ORDER: dict[str, Any] = {"train_dataloader_kwargs": {"shuffle": False}}


class LoRALinear(nn.Linear):
    """A frozen layer with a trainable update of rank 1, which is merged into its weights in eval mode."""

    def __init__(self) -> None:
        super().__init__(4, 2, dtype=torch.float64)
        self.requires_grad_(False)
        self.left = nn.Parameter(torch.ones(2, 1, dtype=torch.float64))
        self.right = nn.Parameter(torch.ones(1, 4, dtype=torch.float64) / 2)
        self.merged = False

    @override
    def train(self, mode: bool = True) -> "LoRALinear":
        if mode == self.merged:
            update = self.left.detach() @ self.right.detach()
            self.weight.data += -update if mode else update
            self.merged = not mode
        return super().train(mode)

    @override
    def forward(self, input: Tensor) -> Tensor:  # as torch names it
        update = 0 if self.merged else input @ self.right.T @ self.left.T
        return super().forward(input) + update


class KeepsNormInEval(nn.Sequential):
    """A model that itself keeps a module in eval mode."""

    @override
    def train(self, mode: bool = True) -> "KeepsNormInEval":
        super().train(mode)
        self[0].eval()
        return self


class EMATrainer(EMAMixin, Trainer):
    ema_decay: float = 0.5


def make_lora(kind: type[Trainer] = Trainer, **options: Any) -> tuple[Trainer, LoRALinear]:
    torch.manual_seed(0)
    layer = LoRALinear()
    optimizer = torch.optim.SGD([layer.left, layer.right], lr=0.1)
    parts = {**tiny_parts(), "model": nn.Sequential(layer), "optimizer": optimizer}
    return kind(**parts, **options), layer


def make(*modules: nn.Module, **options: Any) -> Trainer:
    model = nn.Sequential(*modules, nn.Linear(4, 2).double())
    parts = {**tiny_parts(), "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    return Trainer(**parts, **options)


class ModesOfSteps(Callback[Trainer]):
    def __init__(self) -> None:
        self.modes: list[list[bool]] = []

    @override
    def on_step_end(self, trainer: Trainer, step: StepResult) -> None:
        self.modes.append([module.training for module in trainer.unwrapped_model.children()])


# ---- modules whose `train(mode)` does something


@pytest.mark.parametrize("kind", [Trainer, EMATrainer])
def test_evaluations_do_not_change_how_a_module_trains_that_merges_its_weights(kind: type[Trainer]) -> None:
    losses = []
    for eval_data in (None, tiny_data(8)):
        trainer, layer = make_lora(kind)
        history = trainer.train(tiny_data(24), eval_data, max_steps=8, evaluate_every=Steps(2), **IN_ORDER)
        losses.append([step.loss for step in history.steps])
        assert not layer.merged
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)


def fail(trainer: Trainer) -> None:
    class Failing(Callback[Trainer]):
        @override
        def on_evaluation_start(self, trainer: Trainer, name: str) -> None:
            raise KeyError("on purpose")

    trainer.callbacks = [Failing()]
    with pytest.raises(KeyError):
        trainer.train(tiny_data(), tiny_data(), num_epochs=1, evaluate_first=True)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "use",
    [
        lambda trainer: trainer.evaluate(tiny_data()),
        lambda trainer: trainer.predict(tiny_data()),
        lambda trainer: find_learning_rate(trainer, tiny_data(), steps=10),
        fail,
    ],
    ids=["evaluate", "predict", "find_learning_rate", "exception"],
)
def test_a_module_that_merges_its_weights_is_left_as_it_was(use: Callable[[Trainer], object], merged: bool) -> None:
    trainer, layer = make_lora()
    trainer.model.train(not merged)
    before = layer.weight.clone()
    use(trainer)
    assert (layer.merged, layer.training, trainer.model.training) == (merged, not merged, not merged)
    torch.testing.assert_close(layer.weight, before)


def test_a_module_in_eval_mode_inside_a_training_model_stays_merged() -> None:
    trainer, layer = make_lora()
    layer.eval()
    trainer.evaluate(tiny_data())
    assert (trainer.model.training, layer.training, layer.merged) == (True, False, True)


def test_a_model_that_keeps_a_module_in_eval_mode_does_so_in_a_run() -> None:
    log, model = ModesOfSteps(), KeepsNormInEval(nn.Dropout(), nn.Linear(4, 2).double())
    parts: dict[str, Any] = {**tiny_parts(), "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    Trainer(**parts, callbacks=[log]).train(tiny_data(16), tiny_data(8), num_epochs=2, evaluate_every=Steps(1))
    assert log.modes == [[False, True]] * 4
    assert model[0].training


class MergesAfterAnEpoch(Callback[Trainer]):
    @override
    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        trainer.unwrapped_model.get_submodule("0").eval()

    @override
    def on_step_end(self, trainer: Trainer, step: StepResult) -> None:
        if isinstance(trainer, Saving) and step.step == trainer.fails_after:
            raise KeyboardInterrupt


class Saving(CheckpointMixin, SeedMixin, Trainer):
    seed: int | None = 1
    checkpoint_every: Cadence | None = Steps(1)
    fails_after: int = 0


def test_a_run_resumes_exactly_with_a_module_whose_weights_are_merged(tmp_path: Path) -> None:
    def train(fails_after: int, **options: Any) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(LoRALinear(), nn.Linear(2, 2).double())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        parts = {**tiny_parts(), "model": model, "optimizer": optimizer, "callbacks": [MergesAfterAnEpoch()]}
        trainer = Saving(**parts, **options, fails_after=fails_after)
        with suppress(KeyboardInterrupt):
            trainer.train(tiny_data(24), num_epochs=2)
        return torch.cat([value.flatten() for value in model.state_dict().values()])

    whole = train(0, checkpoint_dir=tmp_path / "whole")
    train(5, checkpoint_dir=tmp_path / "resumed")
    assert torch.equal(train(0, checkpoint_dir=tmp_path / "resumed", resume=True), whole)


# ---- modules that were in eval mode before the run


def test_modules_in_eval_mode_stay_in_it_while_the_rest_trains() -> None:
    log = ModesOfSteps()
    trainer = make(nn.BatchNorm1d(4).double(), nn.Sequential(nn.Dropout()), nn.Dropout(), callbacks=[log])
    norm, block, dropout, _ = trainer.model.children()
    block.eval()
    block.get_submodule("0").train()
    norm.eval()
    trainer.train(tiny_data(16), tiny_data(8), num_epochs=2, evaluate_every=Steps(1))
    assert log.modes == [[False, False, True, True]] * 4
    assert torch.equal(norm.get_buffer("running_mean"), torch.zeros(4, dtype=torch.float64))
    assert [module.training for module in (norm, block, *block.children(), dropout)] == [False, False, True, True]


def test_a_model_in_eval_mode_trains_as_a_whole_and_is_in_eval_mode_again_after_the_run() -> None:
    log = ModesOfSteps()
    trainer = make(nn.Dropout(), callbacks=[log])
    trainer.model.eval()
    for _ in range(2):
        trainer.train(tiny_data(16), tiny_data(8), num_epochs=1)
        assert not any(module.training for module in trainer.model.modules())
    assert log.modes == [[True, True]] * 4


def test_explain_lists_modules_that_stay_in_eval_mode() -> None:
    trainer = make(nn.Sequential(nn.Dropout(), nn.BatchNorm1d(4)), nn.Dropout())
    assert trainer.explain()["modes"] == (("training", "all modules", ""),)
    trainer.model.get_submodule("0.1").eval()
    assert [row[:2] for row in trainer.explain()["modes"]] == [("training", "all other modules"), ("eval", "0.1")]
    trainer.model.get_submodule("0").eval()
    assert [row[:2] for row in trainer.explain()["modes"]] == [("training", "all other modules"), ("eval", "0")]
    trainer.model.eval()
    ((mode, modules, _),) = trainer.explain()["modes"]
    assert (mode, modules) == ("training", "all modules")


# ---- gradients


def train_one_step(prepare: Callable[[Trainer], object], **options: Any) -> Tensor:
    torch.manual_seed(0)
    trainer = make(**options)
    prepare(trainer)
    trainer.train(tiny_data(8), tiny_data(8), max_steps=1, evaluate_first=True, **IN_ORDER)
    return nn.utils.parameters_to_vector(trainer.model.parameters()).detach()


def backward(trainer: Trainer) -> None:
    trainer.model(torch.ones(1, 4, dtype=torch.float64)).sum().backward()


def test_gradients_from_before_a_run_are_not_part_of_its_first_step() -> None:
    assert torch.equal(train_one_step(backward), train_one_step(lambda _: None))


def test_gradients_of_a_step_that_was_interrupted_are_not_part_of_the_next_run() -> None:
    class Interrupted(Callback[Trainer]):
        @override
        def on_step_start(self, trainer: Trainer) -> None:
            backward(trainer)
            raise KeyboardInterrupt

    def interrupt(trainer: Trainer) -> None:
        trainer.callbacks = [Interrupted()]
        with pytest.raises(KeyboardInterrupt):
            trainer.train(tiny_data(8), max_steps=1)
        trainer.callbacks = ()

    assert torch.equal(train_one_step(interrupt), train_one_step(lambda _: None))


class WithGradients(Trainer):
    """A trainer whose evaluation computes gradients, as adversarial examples need them."""

    @override
    def eval_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        with torch.enable_grad():
            output = super().eval_step(batch)
            output.loss.backward()  # type: ignore[no-untyped-call]
        return output


def test_gradients_of_an_evaluation_are_not_part_of_the_next_step() -> None:
    weights = []
    for kind in (Trainer, WithGradients):
        trainer = kind(**tiny_parts())
        trainer.train(tiny_data(16), tiny_data(8), num_epochs=1, evaluate_every=Steps(1), **IN_ORDER)
        weights.append(trainer.model.get_parameter("weight"))
    assert torch.equal(*weights)


def test_an_evaluation_leaves_the_users_gradients_alone() -> None:
    trainer = WithGradients(**tiny_parts())
    backward(trainer)
    weight = trainer.model.get_parameter("weight")
    before = weight.grad
    assert before is not None
    expected = before.clone()
    trainer.evaluate(tiny_data())
    assert weight.grad is before
    assert torch.equal(before, expected)
