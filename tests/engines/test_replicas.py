"""Replicas average gradients without wrapping the model: whatever a step calls, and whichever parameters it trains."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import Callback, GradAccumMixin, Pair, SeedMixin, StepOutput, StepResult, Trainer
from ptacc.engines import reducer
from ptacc.errors import ModelError
from tests.ranks import run_ranks

CLASSES, FEATURES = 3, 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head, self.other = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES), nn.Linear(8, CLASSES)
        self.words = nn.Embedding(5, 8, sparse=True)

    def encode(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = torch.tanh(self.encoder(inputs))
        return hidden

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.encode(inputs))
        return outputs


def call_methods(net: Net, inputs: Tensor, targets: Tensor) -> Tensor:
    outputs: Tensor = net.head(net.encode(inputs)) + net.head(net.encode(2 * inputs))
    return outputs


def use_other_head_for_some_targets(net: Net, inputs: Tensor, targets: Tensor) -> Tensor:
    outputs: Tensor = net(inputs)
    if (targets == 0).any():
        outputs = outputs + net.other(net.encode(inputs)) * (targets == 0)[:, None]
    return outputs


def look_words_up(net: Net, inputs: Tensor, targets: Tensor) -> Tensor:
    outputs: Tensor = net.head(net.encode(inputs) + net.words(targets))
    return outputs


Forward = Callable[[Net, Tensor, Tensor], Tensor]
FORWARDS: dict[str, Forward] = {
    "the model": lambda net, inputs, _: net(inputs),
    "methods and modules": call_methods,
    "a part on some ranks only": use_other_head_for_some_targets,
    "sparse gradients": look_words_up,
}


class Loop(SeedMixin, GradAccumMixin, Trainer):
    forwards: str = "the model"
    is_unwrapped: bool = False

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        net: Any = self.unwrapped_model if self.is_unwrapped else self.model
        outputs = FORWARDS[self.forwards](net, *batch)
        return StepOutput(loss=self.loss_func(outputs, batch[1]), outputs=outputs)


class Complex(nn.Module):
    """A layer with complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 1, dtype=torch.complex64) / 4)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs.to(torch.complex64) @ self.weight).abs()


class Plain(SeedMixin, Trainer):
    default_callbacks: Any = ()


class Reentrant(Loop):
    """Computes the gradient of the encoder in two parts, one after the other."""

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        net: Any = self.model
        inputs = batch[0].clone().requires_grad_()
        hidden = checkpoint(net.encode, inputs, use_reentrant=True)
        outputs = net.head(checkpoint(net.encode, hidden[:, :FEATURES] + inputs, use_reentrant=True))
        unused = sum(parameter.sum() for parameter in net.other.parameters())
        return StepOutput(loss=self.loss_func(outputs, batch[1]) + 0 * unused, outputs=outputs)


def reenter() -> str:
    with pytest.raises(ModelError) as caught:
        train(6, Reentrant)
    return str(caught.value)


class FreezeInStep(Callback[Trainer]):
    """Freezes the encoder in the third step only."""

    @override
    def on_step_end(self, trainer: Trainer, step: StepResult) -> None:
        trainer.unwrapped_model.get_submodule("encoder").requires_grad_(step.step != 2)


def train(batch_size: int, kind: type[Loop] = Loop, *, frozen: bool = False, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    net = Net().double()
    net.encoder.requires_grad_(not frozen)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(24, FEATURES, generator=generator, dtype=torch.float64)
    targets = torch.randint(CLASSES, (24,), generator=generator)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    given: dict[str, Any] = {"seed": 0, "default_callbacks": (), **options}
    trainer = kind(net, loss_func=nn.CrossEntropyLoss(), optimizer=optimizer, **given)
    trainer.train(TensorDataset(inputs, targets), num_epochs=2, per_device_batch_size=batch_size)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in net.parameters())  # noqa: SLF001
    return dict(net.state_dict())


@pytest.mark.parametrize("forwards", FORWARDS)
@pytest.mark.parametrize("options", [{}, {"is_unwrapped": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_a_step_may_call_any_part_of_the_model(forwards: str, options: dict[str, Any]) -> None:
    expected = train(12, forwards=forwards)
    size = 6 // options.get("gradient_accumulation_steps", 1)
    for state in run_ranks(lambda: train(size, forwards=forwards, **options), 2):
        torch.testing.assert_close(state, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_may_be_frozen_and_unfrozen_between_steps(frozen: bool) -> None:
    def unfreeze(batch_size: int) -> dict[str, Tensor]:
        return train(batch_size, frozen=frozen, callbacks=[FreezeInStep()])

    for state in run_ranks(lambda: unfreeze(4), 3):
        torch.testing.assert_close(state, unfreeze(12), rtol=1e-12, atol=1e-12)


class AddLayer(Callback[Trainer]):
    """Adds a layer, with other initial weights on each process, after the first step."""

    @override
    def on_step_end(self, trainer: Trainer, step: StepResult) -> None:
        if step.step == 1:
            torch.manual_seed(trainer.distributed.rank)
            layer = nn.Linear(8, 8).double()
            trainer.unwrapped_model.add_module(
                "encoder", nn.Sequential(trainer.unwrapped_model.get_submodule("encoder"), layer)
            )
            trainer.optimizer.add_param_group({"params": list(layer.parameters())})


def test_a_layer_may_be_added_between_steps() -> None:
    def add_layer(batch_size: int) -> dict[str, Tensor]:
        return train(batch_size, callbacks=[AddLayer()])

    for state in run_ranks(lambda: add_layer(4), 3):
        torch.testing.assert_close(state, add_layer(12), rtol=1e-12, atol=1e-12)


def test_gradients_are_averaged_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train(12)
    monkeypatch.setattr(reducer, "BUCKET_BYTES", 100)
    for state in run_ranks(lambda: train(6), 2):
        torch.testing.assert_close(state, expected, rtol=1e-12, atol=1e-12)


class RecordMeans(Callback[Trainer]):
    def __init__(self) -> None:
        self.means: list[Tensor] = []

    @override
    def on_step_end(self, trainer: Trainer, step: StepResult) -> None:
        self.means.append(trainer.unwrapped_model.get_buffer("0.running_mean").clone())


def test_buffers_are_those_of_rank_0_after_each_step() -> None:
    def record() -> Tensor:
        model, record = nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, 1)), RecordMeans()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = Plain(model, loss_func=nn.MSELoss(), optimizer=optimizer, seed=0, callbacks=[record])
        inputs = torch.randn(24, FEATURES, generator=torch.Generator().manual_seed(0))
        trainer.train(TensorDataset(inputs, inputs[:, :1]), num_epochs=1, per_device_batch_size=4)
        return torch.stack(record.means)

    first, second = run_ranks(record, 2)
    assert len(torch.unique(first, dim=0)) == 3
    assert torch.equal(first, second)


def test_weights_of_any_layout_and_dtype_have_replicas() -> None:
    def train_differently() -> list[Tensor]:
        torch.manual_seed(int(os.environ.get("RANK", "0")))  # the weights of rank 0 count
        model: Any = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), Complex())
        model.to(memory_format=torch.channels_last)
        images = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
        trainer = Plain(model, loss_func=nn.MSELoss(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), seed=0)
        size = 8 // trainer.distributed.world_size
        trainer.train(TensorDataset(images, images[:, 0, 0, :1]), num_epochs=2, per_device_batch_size=size)
        return list(model.state_dict().values())

    for weights in run_ranks(train_differently, 2):
        torch.testing.assert_close(weights, train_differently())


def test_checkpointed_activations_whose_gradients_arrive_in_parts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reducer, "BUCKET_BYTES", 1)
    assert all("changed the gradient of encoder." in text for text in run_ranks(reenter, 2))


def look_up_sparsely(net: Net, inputs: Tensor, targets: Tensor) -> Tensor:
    found = nn.functional.embedding(targets, net.other.weight, sparse=True)
    outputs: Tensor = net.head(net.encode(inputs) + found)
    return outputs


def look_up_densely(net: Net, inputs: Tensor, targets: Tensor) -> Tensor:
    outputs: Tensor = net.head(net.encode(inputs) + net.words.weight[targets])
    return outputs


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (look_up_sparsely, "The gradient of other.weight is sparse.* Use one of these modules, or sparse=False"),
        (look_up_densely, "The gradient of words.weight is not sparse.* Use sparse=False"),
    ],
)
def test_sparse_gradients_outside_of_embeddings_are_refused(
    forward: Forward, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        with pytest.raises(ModelError, match=message):
            train(6, forwards="mine")

    monkeypatch.setitem(FORWARDS, "mine", forward)
    run_ranks(refuse, 2)
    train(6, forwards="mine")


class ByHand(Loop):
    @override
    def backward(self, loss: Tensor) -> None:
        (loss / 2).backward(retain_graph=True)  # type: ignore[no-untyped-call]
        (loss / 2).backward()  # type: ignore[no-untyped-call]


class Twice(Loop):
    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        net: Any = self.model
        self.backward(net.words.weight.sum() + net.other.weight.sum() + net.other.bias.sum())
        return super().train_step(batch)


def test_gradients_computed_by_hand_are_averaged_too() -> None:
    for state in run_ranks(lambda: train(6, ByHand), 2):
        torch.testing.assert_close(state, train(12), rtol=1e-12, atol=1e-12)


def test_a_second_backward_pass_of_a_batch_is_refused_once_gradients_were_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reducer, "BUCKET_BYTES", 1)

    def message() -> str:
        with pytest.raises(ModelError) as caught:
            train(6, Twice, forwards="methods and modules")
        return str(caught.value)

    assert all("backward() was called twice for the last batch of a step" in text for text in run_ranks(message, 2))
