"""The public assertions accept correct trainers and name what is wrong with others; the real dataset is real."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from typing_extensions import override

from ptacc import (
    AMPMixin,
    Callback,
    DataLoaderConfig,
    EarlyStoppingMixin,
    GradAccumMixin,
    GradClipMixin,
    LRSchedulerMixin,
    Mixin,
    RestoreBestWeights,
    RunPlan,
    SeedMixin,
    StepOutput,
    Trainer,
    TrainerCore,
    TrainingLoop,
)
from ptacc.errors import OptionError
from ptacc.protocols import Precision
from ptacc.testing import (
    assert_overfits_one_batch,
    assert_split_invariant,
    iris,
    iris_parts,
    iris_split,
    tiny_data,
    tiny_parts,
)
from tests.ranks import run_ranks


def texts(samples: int = 60) -> list[list[int]]:
    """Return texts of 1 to 7 tokens, of 5 kinds."""
    return [[(3 * i + j * j) % 5 for j in range(1 + i % 7)] for i in range(samples)]


def padded(samples: list[list[int]]) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(s) for s in samples], batch_first=True, padding_value=-100)


class TextLoop(TrainingLoop[Tensor, Tensor]):
    """Learns to repeat each token. Losses are means over the tokens that are not padding."""

    @override
    def count_items(self, batch: Tensor) -> int:
        return int((batch != -100).sum())

    @override
    def train_step(self, batch: Tensor) -> StepOutput[Tensor]:
        logits = self.model(batch.clamp(min=0))
        return StepOutput(loss=nn.functional.cross_entropy(logits.flatten(0, 1), batch.flatten()), outputs=logits)


class SummedTextLoop(TextLoop):
    @override
    def train_step(self, batch: Tensor) -> StepOutput[Tensor]:
        output = super().train_step(batch)
        return StepOutput.from_sum(output.loss * self.count_items(batch), outputs=output.outputs)


class CountsTexts(TextLoop):
    @override
    def count_items(self, batch: Tensor) -> int:
        return len(batch)


class CountsPadding(TextLoop):
    @override
    def count_items(self, batch: Tensor) -> int:
        return batch.numel()


def text_parts() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.5), "default_callbacks": ()}


def tiny_with(*layers: nn.Module) -> dict[str, Any]:
    """Return parts for `tiny_data` with layers in front of the linear one."""
    model = nn.Sequential(*layers, tiny_parts()["model"]).double()
    return tiny_parts() | {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}


# ---- splits: accepted trainers


def test_the_supervised_trainer_is_split_invariant_in_both_precisions() -> None:
    assert_split_invariant(lambda: Trainer(**tiny_parts()), tiny_data(100))
    assert_split_invariant(lambda: Trainer(**iris_parts()), iris())


@pytest.mark.parametrize("loop", [TextLoop, SummedTextLoop])
def test_a_mean_over_tokens_is_split_invariant(loop: type[TextLoop]) -> None:
    assert_split_invariant(lambda: loop(**text_parts()), texts(), collate_fn=padded)


class Everything(SeedMixin, GradAccumMixin, GradClipMixin, LRSchedulerMixin, EarlyStoppingMixin, Trainer):
    max_grad_norm: float | None = 0.05
    gradient_accumulation_steps: int = 3


def one_cycle(optimizer: Optimizer, plan: RunPlan) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=0.5, total_steps=plan.total_steps)


def test_accumulation_clipping_and_a_schedule_are_split_invariant() -> None:
    data = tiny_data(100)
    assert_split_invariant(lambda: Everything(**tiny_parts(), create_scheduler=one_cycle), data, eval_dataset=data)


class SharedShift(nn.Module):
    """Adds one number to all logits, which changes no loss. Its gradient is only rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = tiny_parts()["model"]
        self.shift = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.linear(inputs) + self.shift
        return logits


def test_a_weight_that_moves_by_rounding_alone_is_accepted() -> None:
    def make() -> Trainer:
        model = SharedShift()
        parts: dict[str, Any] = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
        return Trainer(**tiny_parts() | parts)

    assert_split_invariant(make, tiny_data(100))


class BFloatTrainer(AMPMixin, Trainer):
    mixed_precision: Precision | None = "bf16"


def test_mixed_precision_has_a_tolerance_of_its_own() -> None:
    assert_split_invariant(lambda: BFloatTrainer(**iris_parts()), iris())
    with pytest.raises(AssertionError, match="and 1e-09 counts as rounding"):
        assert_split_invariant(lambda: BFloatTrainer(**iris_parts()), iris(), rel=1e-9)


def test_a_split_over_processes_is_tested_in_a_launch() -> None:
    def check() -> str:
        assert_split_invariant(lambda: SummedTextLoop(**text_parts()), texts(), collate_fn=padded, window=6)
        with pytest.raises(AssertionError) as raised:
            assert_split_invariant(lambda: CountsTexts(**text_parts()), texts(), collate_fn=padded, window=6)
        return str(raised.value)

    first, second = run_ranks(check, 2)
    assert first == second
    assert "in 2 batches of 3 on each of 2 replicas, and" in first


# ---- splits: failing trainers


def test_tokens_counted_as_samples_fail() -> None:
    message = (
        r"CountsTexts: the loss of step 1 is 1\.\d+ in 2 batches of 6, and 1\.\d+ in one batch of 12: .*count_items"
    )
    with pytest.raises(AssertionError, match=message):
        assert_split_invariant(lambda: CountsTexts(**text_parts()), texts(), collate_fn=padded)


def test_items_that_depend_on_the_split_are_reported() -> None:
    with pytest.raises(AssertionError, match="count_items counts 78 items in the step, and 84 where it is one batch"):
        assert_split_invariant(lambda: CountsPadding(**text_parts()), texts(), collate_fn=padded)


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.BatchNorm1d(4), "0 is a BatchNorm1d, which takes mean and variance"),
        (nn.Dropout(0.3), "0 is a Dropout, which draws random numbers"),
    ],
)
def test_a_layer_that_depends_on_the_batch_is_named(layer: nn.Module, named: str) -> None:
    with pytest.raises(AssertionError, match=f"the loss of step 1 is .*{named}"):
        assert_split_invariant(lambda: Trainer(**tiny_with(copy.deepcopy(layer))), tiny_data(100))


def test_dropout_that_drops_nothing_is_accepted() -> None:
    assert_split_invariant(lambda: Trainer(**tiny_with(nn.Dropout(0.0))), tiny_data(100))


class DividesTwice(GradAccumMixin, Trainer):
    @override
    def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().compute_train_loss(outputs, targets) / self.gradient_accumulation_steps


def test_a_loss_that_is_divided_by_the_accumulation_twice_fails() -> None:
    with pytest.raises(AssertionError, match=r"relative difference of 5\.0e-01, .*divided by the number of batches"):
        assert_split_invariant(lambda: DividesTwice(**tiny_parts()), tiny_data(100))


class ClipsEachBatch(Trainer):
    @override
    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.05)


def test_clipping_each_batch_fails_at_the_second_step() -> None:
    with pytest.raises(AssertionError, match=r"the loss of step 2 is .*done to the gradients of each batch"):
        assert_split_invariant(lambda: ClipsEachBatch(**tiny_parts()), tiny_data(100))


class Shifting(Mixin):
    @override
    def on_run_end(self) -> None:
        super().on_run_end()
        with torch.no_grad():
            self.unwrapped_model.get_parameter("bias").add_(1e-6 * self.run.accumulation.largest)


class ShiftingTrainer(Shifting, Trainer): ...


def test_different_final_weights_fail_with_the_name_of_the_tensor() -> None:
    with pytest.raises(AssertionError, match="the losses agree, but 'bias' ends with the norm"):
        assert_split_invariant(lambda: ShiftingTrainer(**tiny_parts()), tiny_data(100))


class NeedsThree(Trainer):
    @override
    def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        assert len(outputs) > 2, "too few for a ranking"
        return super().compute_train_loss(outputs, targets)


def test_a_training_that_fails_with_one_split_alone_fails() -> None:
    with pytest.raises(
        AssertionError, match="fails in 2 batches of 6, and not in one batch of 12: AssertionError: too"
    ):
        assert_split_invariant(lambda: NeedsThree(**tiny_parts()), tiny_data(100))


class DropsLast(Trainer):
    @override
    def make_train_dataloader(self, request: DataLoaderConfig) -> DataLoader[object]:
        request.kwargs["drop_last"] = True
        return super().make_train_dataloader(request)


def test_another_number_of_steps_fails() -> None:
    with pytest.raises(AssertionError, match=r"takes 6 steps in 3 batches of 4, and 4 in .* Look for drop_last"):
        assert_split_invariant(lambda: DropsLast(**tiny_parts()), tiny_data(29))


def test_a_nan_loss_cannot_be_a_reference() -> None:
    data = TensorDataset(torch.full((40, 4), torch.nan, dtype=torch.float64), torch.zeros(40, dtype=torch.int64))
    with pytest.raises(AssertionError, match="the loss of step 1 is nan in one batch of 12"):
        assert_split_invariant(lambda: Trainer(**tiny_parts()), data)


# ---- splits: arguments


def test_trainers_with_different_initial_weights_are_invalid() -> None:
    with pytest.raises(OptionError, match=r"two fresh trainers differ in '0\.weight', .*torch\.manual_seed\(0\)"):
        assert_split_invariant(lambda: Trainer(**tiny_with(nn.Linear(4, 4))), tiny_data(100))


def test_one_trainer_may_be_returned_at_each_call_and_is_left_unchanged() -> None:
    trainer = Trainer(**tiny_parts())
    assert_split_invariant(lambda: trainer, tiny_data(100))
    assert torch.equal(trainer.model.state_dict()["weight"], tiny_parts()["model"].weight)
    assert not trainer.has_run


class Stream(IterableDataset[tuple[Tensor, ...]]):
    @override
    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return (tiny_data()[index] for index in itertools.count())


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (tiny_data(12), {}, "got 12 samples, and needs at least 13"),
        (Stream(), {}, r"data=Stream\(\.\.\.\)\): makes its own batches .*islice"),
        (tiny_data(100), {"window": 1}, "window=1.*at least 2"),
        (tiny_data(100), {"rel": 0.0}, r"rel=0\.0"),
    ],
)
def test_data_or_numbers_that_cannot_be_split_are_invalid(data: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        assert_split_invariant(lambda: Trainer(**tiny_parts()), data, **options)


def test_a_smoke_run_does_not_cut_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTACC_LIMIT_BATCHES", "2")
    with pytest.raises(AssertionError, match="the loss of step 2"):
        assert_split_invariant(lambda: ClipsEachBatch(**tiny_parts()), tiny_data(100))
    assert_overfits_one_batch(Trainer(**tiny_parts()), tiny_data())


# ---- overfitting one batch


class Scheduled(GradAccumMixin, GradClipMixin, LRSchedulerMixin, Trainer):
    gradient_accumulation_steps: int = 2
    max_grad_norm: float | None = 1.0


def test_trainers_that_learn_pass() -> None:
    assert_overfits_one_batch(Trainer(**tiny_parts()), tiny_data())
    assert_overfits_one_batch(Trainer(**iris_parts()), iris())
    assert_overfits_one_batch(TextLoop(**text_parts()), texts(), collate_fn=padded)
    assert_overfits_one_batch(Scheduled(**tiny_parts(), create_scheduler=one_cycle), tiny_data())


def test_each_process_overfits_its_own_batch_in_a_launch() -> None:
    def check() -> list[float]:
        trainer = Trainer(**tiny_parts())
        assert_overfits_one_batch(trainer, tiny_data(11))
        with pytest.raises(AssertionError, match="on one batch of 5 samples: the loss began"):
            assert_overfits_one_batch(trainer, tiny_data(11), steps=2)
        return [float(value) for value in trainer.model.state_dict()["weight"].flatten()]

    assert run_ranks(check, 2) == [torch.linspace(-0.5, 0.5, 8, dtype=torch.float64).tolist()] * 2


def frozen() -> Trainer:
    parts = tiny_with(nn.Linear(4, 4))
    parts["model"][0].requires_grad_(requires_grad=False)
    parts["optimizer"] = torch.optim.SGD(parts["model"].parameters(), lr=1e-9)
    return Trainer(**parts)


def test_a_trainer_that_does_not_learn_fails_with_what_to_check() -> None:
    with pytest.raises(AssertionError) as raised:
        assert_overfits_one_batch(frozen(), tiny_data(), steps=20)
    text = str(raised.value)
    assert text.startswith("Trainer, on one batch of 8 samples: the loss began at ")
    for part in ("at step 20, not below", "learning rate (1e-09 in the first", "(0.weight, 0.bias)", "shifted by one?"):
        assert part in text


class Detached(Trainer):
    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        first, second = self.model.children()
        outputs = second(first(batch[0]).detach())
        return StepOutput(loss=self.loss_func(outputs, batch[1]), outputs=outputs)


def test_parameters_without_a_gradient_are_named() -> None:
    parts = tiny_with(nn.Linear(4, 4))
    with pytest.raises(AssertionError, match=r"did not change, .* hold them \(0\.weight, 0\.bias\)"):
        assert_overfits_one_batch(Detached(**parts), tiny_data(), steps=2)


def test_a_loss_that_becomes_infinite_fails() -> None:
    parts: dict[str, Any] = tiny_parts() | {"loss_func": lambda outputs, targets: outputs.square().mean()}
    parts["optimizer"] = torch.optim.SGD(parts["model"].parameters(), lr=100.0)
    with pytest.raises(AssertionError, match=r"the loss began at 0\.\d+ and is inf at step \d+\."):
        assert_overfits_one_batch(Trainer(**parts), tiny_data())


def test_a_loss_that_is_nan_from_the_start_fails() -> None:
    data = TensorDataset(torch.full((8, 4), torch.nan, dtype=torch.float64), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(AssertionError, match="the loss is nan at step 1"):
        assert_overfits_one_batch(Trainer(**tiny_parts()), data, steps=2)


def test_a_loss_below_zero_fails() -> None:
    parts: dict[str, Any] = tiny_parts() | {"loss_func": lambda outputs, targets: -outputs.square().mean() - 1}
    with pytest.raises(AssertionError, match=r"the loss begins at -\d.*Add a constant"):
        assert_overfits_one_batch(Trainer(**parts), tiny_data(), steps=2)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("make_optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_weights_and_optimizer_are_restored(make_optimizer: Callable[..., torch.optim.Optimizer], fails: bool) -> None:
    parts = tiny_parts()
    parts["optimizer"] = make_optimizer(parts["model"].parameters(), lr=0.1)
    trainer = Trainer(**parts)
    trainer.train(tiny_data(), num_epochs=1)
    before = copy.deepcopy((trainer.model.state_dict(), trainer.optimizer.state_dict(), trainer.progress))
    with pytest.raises(AssertionError) if fails else contextlib.nullcontext():
        assert_overfits_one_batch(trainer, tiny_data(), steps=2 if fails else 200, to=1e-9 if fails else 0.3)
    assert str((trainer.model.state_dict(), trainer.optimizer.state_dict(), trainer.progress)) == str(before)


def test_no_callback_is_called_and_no_file_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best: Callback[TrainerCore] = RestoreBestWeights("eval_loss")
    parts = tiny_parts()
    del parts["default_callbacks"]
    trainer = Trainer(**parts, callbacks=[best], history_file=tmp_path / "history.jsonl")
    assert_overfits_one_batch(trainer, tiny_data())
    assert not trainer.has_run
    assert trainer.callbacks == [best]
    assert (list(tmp_path.iterdir()), *capsys.readouterr()) == ([], "", "")


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"steps": 1}, {"steps": 1001}, {"to": 1.0}, {"to": 0.0}])
def test_numbers_out_of_range_are_invalid(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(OptionError, match=f"{name}={options[name]!r}"):
        assert_overfits_one_batch(Trainer(**tiny_parts()), tiny_data(), **options)


def noisy(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs + 0.01 * torch.randn_like(outputs), targets)


def test_neither_assertion_moves_the_global_generators() -> None:
    parts: dict[str, Any] = {"loss_func": noisy}
    trainer, state = Trainer(**tiny_parts() | parts), torch.get_rng_state()
    assert_split_invariant(lambda: SummedTextLoop(**text_parts()), texts(), collate_fn=padded)
    assert_overfits_one_batch(trainer, tiny_data(), to=0.5)
    assert torch.equal(torch.get_rng_state(), state)


# ---- the real dataset


def test_iris_is_scikit_learns() -> None:
    measures, kinds = map(np.asarray, load_iris(return_X_y=True))
    inputs, targets = iris().tensors
    assert targets.tolist() == kinds.tolist()
    np.testing.assert_allclose(inputs.numpy(), (measures - measures.mean(axis=0)) / measures.std(axis=0), rtol=1e-5)


def test_iris_is_learned_well_enough_to_classify_held_out_flowers() -> None:
    train, held_out = iris_split()
    trainer = Trainer(**iris_parts())
    trainer.train(train, num_epochs=20)
    guesses = torch.stack(list(trainer.predict(held_out))).argmax(dim=1)
    assert int(guesses.eq(held_out.tensors[1]).sum()) >= 0.95 * len(held_out)


def test_no_flower_is_both_trained_on_and_held_out() -> None:
    full, (train, held_out) = iris(), iris_split()
    rebuilt = torch.cat([held_out.tensors[0].reshape(30, 1, 4), train.tensors[0].reshape(30, 4, 4)], dim=1)
    assert torch.equal(rebuilt.reshape(150, 4), full.tensors[0])


def test_iris_parts_are_the_same_whatever_was_drawn_and_draw_nothing() -> None:
    torch.manual_seed(7)
    first, state = iris_parts()["model"], torch.get_rng_state()
    second = iris_parts()["model"]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first.parameters(), second.parameters()))
