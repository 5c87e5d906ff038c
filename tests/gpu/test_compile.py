"""A model compiled by inductor trains as the original does, apart from rounding."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import reset
from torch._dynamo.utils import counters
from torch.optim import SGD
from typing_extensions import override

from ptacc import AMPMixin, CompileMixin, Pair, StepOutput, Trainer, TrainingLoop
from ptacc.protocols import CompileMode, Precision
from tests.gpu.parts import BATCH, BATCHES, make_data, make_net

pytestmark = [
    pytest.mark.timeout(300),  # inductor's first graph takes a minute
    # Warnings of dynamo, inductor and Triton about their own code.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Mixed(AMPMixin, Trainer): ...


class Compiled(CompileMixin, Mixed): ...


def train(kind: type[Mixed], precision: Precision, **options: Any) -> tuple[nn.Module, list[float]]:
    net = make_net()
    trainer = kind(
        net,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=SGD(net.parameters(), lr=0.1, momentum=0.9),
        mixed_precision=precision,
        default_callbacks=(),
        **options,
    )
    history = trainer.train(
        make_data(), num_epochs=2, per_device_batch_size=BATCH, train_dataloader_kwargs={"shuffle": False}
    )
    return trainer.model, [step.loss for step in history.steps]


@pytest.mark.parametrize(("precision", "relative"), [("no", 1e-3), ("bf16", 2e-2)])
def test_a_compiled_model_trains_as_the_original(device: torch.device, precision: Precision, relative: float) -> None:
    reset()
    counters.clear()
    (compiled, losses), (original, expected) = train(Compiled, precision), train(Mixed, precision)
    assert counters["stats"]["unique_graphs"] >= 1
    assert type(compiled) is type(original)
    torch.testing.assert_close(losses, expected, rtol=relative, atol=relative)
    weights: list[Tensor] = [parameter.detach() for parameter in compiled.parameters()]
    assert {weight.device.type for weight in weights} == {device.type}


class OwnLoss(nn.Module):
    """Computes its loss itself, as models of transformers do: the loss is in the memory of a CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    @override
    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.net(inputs), targets)


class TrainsOwnLoss(CompileMixin, TrainingLoop[Pair, Tensor]):
    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        loss = self.model(*batch)
        return StepOutput(loss=loss, outputs=loss.detach())


def test_the_losses_of_a_cuda_graph_are_kept_although_it_overwrites_them() -> None:
    def losses(**options: Any) -> list[float]:
        reset()
        model = OwnLoss()
        optimizer = SGD(model.parameters(), lr=0.1)
        trainer = TrainsOwnLoss(model, optimizer=optimizer, default_callbacks=(), **options)
        data: Any = make_data()
        kwargs: Any = {"shuffle": False}
        history = trainer.train(data, num_epochs=1, per_device_batch_size=BATCH, train_dataloader_kwargs=kwargs)
        return [step.loss for step in history.steps]

    expected = losses(compile_backend="eager")
    assert len(set(expected)) == BATCHES
    torch.testing.assert_close(losses(compile_mode="reduce-overhead"), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_losses_are_those_of_the_original_with_and_without_cuda_graphs(device: torch.device, mode: CompileMode) -> None:
    reset()
    (compiled, losses), (_, expected) = train(Compiled, "no", compile_mode=mode), train(Mixed, "no")
    assert {weight.device.type for weight in compiled.parameters()} == {device.type}
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-3)
