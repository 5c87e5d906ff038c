"""A model compiled by inductor trains as the original does, apart from rounding."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import reset
from torch._dynamo.utils import counters
from torch.optim import SGD

from ptacc import AMPMixin, CompileMixin, Trainer
from ptacc.protocols import CompileMode, Precision
from tests.gpu.parts import BATCH, make_data, make_net

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


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_losses_are_those_of_the_original_with_and_without_cuda_graphs(device: torch.device, mode: CompileMode) -> None:
    reset()
    (compiled, losses), (_, expected) = train(Compiled, "no", compile_mode=mode), train(Mixed, "no")
    assert {weight.device.type for weight in compiled.parameters()} == {device.type}
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-3)
