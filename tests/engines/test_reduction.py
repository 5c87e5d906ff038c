"""With DDP, a gradient that is not averaged is an error that names its parameter, before the update."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from ptacc import Callback, DDPMixin, DeepSpeedMixin, FSDPMixin, StepResult, Trainer
from ptacc.engines.reduction import find_differences, join_names
from ptacc.errors import ModelError
from ptacc.testing import tiny_parts
from tests.engines.nets import digits
from tests.marks import DEEPSPEED
from tests.ranks import run_ranks

pytestmark = [
    *DEEPSPEED,
    pytest.mark.filterwarnings("ignore:`torch.distributed.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
]


class Unfreeze(Callback[Trainer]):
    @override
    def on_step_end(self, trainer: Trainer, step: StepResult) -> None:
        trainer.unwrapped_model.requires_grad_(True)


class AddLayer(Callback[Trainer]):
    @override
    def on_step_end(self, trainer: Trainer, step: StepResult) -> None:
        if step.step == 1:
            layer = nn.Linear(10, 10)
            trainer.unwrapped_model.add_module("added", layer)
            trainer.optimizer.add_param_group({"params": list(layer.parameters())})


class Wrapped(DDPMixin, Trainer): ...


class Twice(Wrapped):
    @override
    def backward(self, loss: Tensor) -> None:
        (loss / 2).backward(retain_graph=True)  # type: ignore[no-untyped-call]
        (loss / 2).backward()  # type: ignore[no-untyped-call]


class ByHand(Wrapped):
    @override
    def backward(self, loss: Tensor) -> None:
        parameters = list(self.unwrapped_model.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient


def train(kind: Callable[..., Trainer], **options: Any) -> tuple[str, bool]:
    """Return the error of a run, and whether the last step changed a weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 10))
    model.get_submodule("0").requires_grad_(not any(isinstance(c, Unfreeze) for c in options.get("callbacks", ())))
    parts = {**tiny_parts(), "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    trainer, before = kind(**parts, **options), nn.utils.parameters_to_vector(model.parameters()).clone()
    try:
        trainer.train(digits(96), max_steps=6, per_device_batch_size=8)
    except ModelError as error:
        return str(error), not torch.equal(nn.utils.parameters_to_vector(model.parameters()), before)
    return "", True


@pytest.mark.parametrize("kind", [Twice, ByHand])
def test_gradients_that_are_not_averaged_are_refused_before_the_first_update(kind: type[Trainer]) -> None:
    for message, was_updated in run_ranks(train, 2, kind):
        assert "different gradients of 0.weight, 0.bias, 1.weight and 1 more" in message
        assert not was_updated


def test_gradients_that_are_no_longer_averaged_are_found_within_the_run() -> None:
    for message, _ in run_ranks(lambda: train(Wrapped, callbacks=[AddLayer()]), 2):
        assert "different gradients of" in message


class ZeRO(DeepSpeedMixin, Trainer): ...


@pytest.mark.parametrize("kind", [Wrapped, ZeRO])
def test_a_parameter_that_is_unfrozen_within_a_run_is_refused(kind: type[Trainer]) -> None:
    for message, _ in run_ranks(lambda: train(kind, callbacks=[Unfreeze()]), 2):
        assert "0.weight, 0.bias required no gradient when the run began" in message


class Sharded(FSDPMixin, Trainer): ...


def test_a_parameter_that_is_unfrozen_within_a_run_is_trained_where_the_engine_can() -> None:
    assert train(Trainer, callbacks=[Unfreeze()]) == ("", True)
    assert run_ranks(lambda: train(Trainer, callbacks=[Unfreeze()]), 2) == [("", True)] * 2
    assert run_ranks(lambda: train(Sharded, callbacks=[Unfreeze()]), 2) == [("", True)] * 2


def test_gradients_of_any_kind_are_compared_by_their_bits() -> None:
    def compare() -> list[bool]:
        dist.init_process_group("gloo")
        own = float(dist.get_rank())
        kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64)
        gradients = [torch.tensor([float("nan"), 1.0, value], dtype=kind) for kind in kinds for value in (0.5, own)]
        gradients += [torch.eye(3).t()[:, :2].to_sparse(), (torch.eye(3) * own).to_sparse()]
        parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        parameters.append(nn.Parameter(torch.zeros(1)))
        different = find_differences(parameters)
        return [any(parameter is other for other in different) for parameter in parameters]

    assert run_ranks(compare, 2) == [[False, True] * 6 + [False]] * 2


def test_an_error_names_three_parameters_at_most() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    parameters = [*model.parameters()]
    assert join_names(model, parameters[:3]) == "0.weight, 0.bias, 1.weight"
    assert join_names(model, parameters) == "0.weight, 0.bias, 1.weight and 1 more"
