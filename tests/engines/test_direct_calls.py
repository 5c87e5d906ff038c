"""A step may call methods and submodules of the model with every engine: the weights are those of one process."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import (
    DDPMixin,
    DeepSpeedMixin,
    FSDPMixin,
    GradAccumMixin,
    GradClipMixin,
    SeedMixin,
    StepOutput,
    TensorParallelMixin,
    Trainer,
)
from ptacc.errors import ModelError
from ptacc.types.aliases import Pair
from tests.engines.nets import Block
from tests.marks import DEEPSPEED
from tests.ranks import run_ranks

pytestmark = [  # of DeepSpeed itself
    *DEEPSPEED,
    pytest.mark.filterwarnings("ignore:`torch.distributed.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
]


class Coder(nn.Module):
    """Has units of FSDP2, parameters of its own, methods, and a forward that calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave, self.head = nn.Linear(6, 7), nn.Linear(7, 6), nn.Linear(7, 3)
        self.blocks = nn.ModuleList(Block(7) for _ in range(2))
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 7))

    def encode(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.gain * self.enter(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden

    def decode(self, hidden: Tensor) -> Tensor:
        outputs: Tensor = self.leave(self.blocks[0](hidden * self.gain)) + hidden @ self.enter.weight
        return outputs

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return self.decode(self.encode(inputs))


def use_methods(net: Coder, inputs: Tensor) -> Tensor:
    hidden = net.encode(inputs)
    return net.decode(hidden) + net.decode(2 * hidden) + net.encode(3 * inputs).mean(dim=1, keepdim=True)


def use_submodules(net: Coder, inputs: Tensor) -> Tensor:
    hidden: Tensor = net.blocks[0](net.blocks[1](net.enter(inputs)))  # units of FSDP2, too
    outputs: Tensor = net.leave(hidden) + net.head(hidden).sum(dim=1, keepdim=True) + net.gain.square().sum()
    return outputs


def chain(net: Coder, inputs: Tensor) -> Tensor:
    """Call the model between methods, on inputs that require a gradient."""
    outputs: Tensor = net(net(net.decode(net.encode(inputs))))
    with torch.no_grad():
        target: Tensor = net(inputs)
    return outputs - target


CALLS: Mapping[str, Callable[[Any, Tensor], Tensor]] = {
    "the model": lambda net, inputs: net(inputs),
    "methods": use_methods,
    "modules": use_submodules,
    "a chain": chain,
}


class Coding(SeedMixin, GradAccumMixin, GradClipMixin, Trainer):
    calls: str = "the model"
    is_unwrapped: bool = False
    rtol: float = 1e-12
    max_grad_norm: float | None = 1.0

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        net: Any = self.unwrapped_model if self.is_unwrapped else self.model
        outputs = CALLS[self.calls](net, batch[0])
        unused: Tensor = 0 * net.head(torch.zeros(7, dtype=outputs.dtype)).sum()  # ZeRO requires all gradients
        return StepOutput(loss=self.loss_func(outputs, batch[1]) + unused, outputs=outputs)

    @override
    def eval_step(self, batch: Pair) -> StepOutput[Tensor]:
        return self.train_step(batch)


class DDP(DDPMixin, Coding): ...


class Sharded(FSDPMixin, Coding): ...


class Split(TensorParallelMixin, Coding): ...


class SplitAndSharded(FSDPMixin, TensorParallelMixin, Coding): ...


class ZeRO(DeepSpeedMixin, Coding):
    rtol: float = 1e-5  # DeepSpeed updates weights in float32


PLAN = {"leave": "colwise_gather_output"}
ENGINES: Mapping[str, tuple[type[Coding], dict[str, Any]]] = {
    "DDP": (DDP, {}),
    "DDP that searches": (DDP, {"ddp_find_unused_parameters": True}),
    "FSDP2": (Sharded, {}),
    "FSDP2 of one unit": (Sharded, {"fsdp_wrap": []}),
    "FSDP2 that keeps units": (Sharded, {"fsdp_reshard_after_forward": False}),
    "tensor parallelism": (Split, {"tensor_parallel_plan": PLAN}),
    "ZeRO 1": (ZeRO, {"zero_stage": 1}),
    "ZeRO 2": (ZeRO, {"zero_stage": 2}),
}


def train(kind: type[Coding], **options: Any) -> tuple[dict[str, Tensor], float]:
    torch.manual_seed(0)
    dtype = torch.float32 if issubclass(kind, DeepSpeedMixin) else torch.float64
    net, data = Coder().to(dtype), TensorDataset(*torch.randn(2, 24, 6, dtype=torch.float64).to(dtype))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    trainer = kind(net, loss_func=nn.MSELoss(), optimizer=optimizer, seed=0, default_callbacks=(), **options)
    size = 12 // trainer.gradient_accumulation_steps // trainer.distributed.replicas
    history = trainer.train(data, data, num_epochs=2, per_device_batch_size=size)
    return dict(net.state_dict()), history[-1].eval_loss or 0.0


@pytest.mark.parametrize("calls", CALLS)
@pytest.mark.parametrize("engine", ENGINES)
def test_weights_and_evaluations_are_those_of_one_process(engine: str, calls: str) -> None:
    kind, options = ENGINES[engine]
    expected = train(Coding, calls=calls)
    for numbers in run_ranks(lambda: train(kind, calls=calls, gradient_accumulation_steps=2, **options), 2, timeout=60):
        torch.testing.assert_close(numbers, expected, rtol=kind.rtol, atol=kind.rtol, check_dtype=False)


def test_layers_that_are_split_and_sharded_may_be_called() -> None:
    options: dict[str, Any] = {"tensor_parallel_plan": PLAN, "tensor_parallel_size": 2, "calls": "a chain"}
    expected = train(Coding, calls="a chain")
    for numbers in run_ranks(lambda: train(SplitAndSharded, **options), 4, timeout=60):
        torch.testing.assert_close(numbers, expected, rtol=1e-12, atol=1e-12)


class ByHand(Coding):
    @override
    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]


class ShardedByHand(FSDPMixin, ByHand): ...


class DDPByHand(DDPMixin, ByHand): ...


@pytest.mark.parametrize(
    ("kind", "options"),
    [(DDP, {"is_unwrapped": True}), (DDPByHand, {}), (ShardedByHand, {}), (ShardedByHand, {"fsdp_wrap": []})],
)
def test_the_model_itself_and_a_backward_pass_by_hand_train_as_well(kind: type[Coding], options: Any) -> None:
    expected = train(Coding, calls="methods")
    for numbers in run_ranks(lambda: train(kind, calls="methods", **options), 2, timeout=60):
        torch.testing.assert_close(numbers, expected, rtol=1e-12, atol=1e-12)


class UsingAUnit(Sharded):
    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        net: Any = self.model
        outputs = net.blocks[0].linear(net.enter(batch[0]))
        return StepOutput(loss=outputs.mean(), outputs=outputs)


def test_a_part_of_a_unit_is_refused_by_name() -> None:
    def refuse() -> str:
        with pytest.raises(ModelError) as caught:
            train(UsingAUnit)
        return str(caught.value)

    for message in run_ranks(refuse, 2, timeout=60):
        assert "parameters of a unit of FSDP2 outside of the unit's forward" in message


class Penalizing(Sharded):
    """Computes a gradient within the step, and evaluates by one, too."""

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        inputs = batch[0].clone().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.model(inputs).square().sum(), inputs)
        outputs: Tensor = self.model(batch[0] + slope.detach())
        return StepOutput(loss=self.loss_func(outputs, batch[1]), outputs=outputs)


@pytest.mark.parametrize("units", [None, []])
def test_with_fsdp_a_step_may_compute_gradients_itself(units: list[str] | None) -> None:
    expected = train(Penalizing, fsdp_wrap=units)
    for numbers in run_ranks(lambda: train(Penalizing, fsdp_wrap=units), 2, timeout=60):
        torch.testing.assert_close(numbers, expected, rtol=1e-12, atol=1e-12)
