"""The estimates of memory equal what a step allocates."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from ptacc.profiling.memory_estimate import (
    STATE_TENSORS,
    ShardCounts,
    autocast_weights,
    count_bytes,
    count_state_bytes,
    memory_rows,
)
from ptacc.tensors.structures import iterate_tensors

OPTIMIZERS: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (SGD, {}),
    (SGD, {"momentum": 0.9}),
    (Adam, {}),
    (Adam, {"amsgrad": True}),
    (AdamW, {}),
    (AdamW, {"amsgrad": True}),
    (NAdam, {}),
    (RAdam, {}),
    (Adamax, {}),
    (Adadelta, {}),
    (Adagrad, {}),
    (RMSprop, {}),
    (RMSprop, {"momentum": 0.9, "centered": True}),
    (Rprop, {}),
    (ASGD, {}),
    (Muon, {}),
]


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3, bias=False, dtype=dtype), nn.Linear(3, 5, bias=False, dtype=dtype))
    model[0].requires_grad_(False)
    return model


def step(model: nn.Module, optimizer: Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()


def measured_bytes(optimizer: Optimizer) -> int:
    tensors: list[Tensor] = list(iterate_tensors(list(optimizer.state.values())))
    return sum(tensor.nbytes for tensor in tensors if tensor.dim())  # scalars, such as the step, are left out


@pytest.mark.parametrize(("kind", "settings"), OPTIMIZERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_estimated_state_of_an_optimizer_is_its_state_after_a_step(
    kind: Callable[..., Optimizer], settings: dict[str, Any], dtype: torch.dtype
) -> None:
    model = make_model(dtype)
    optimizer = kind(filter(lambda parameter: parameter.requires_grad, model.parameters()), lr=0.1, **settings)
    estimated = count_state_bytes(optimizer)
    step(model, optimizer)
    assert estimated is not None
    assert estimated == pytest.approx(measured_bytes(optimizer), abs=4)
    assert count_state_bytes(optimizer) == sum(t.nbytes for t in iterate_tensors(list(optimizer.state.values())))


def test_every_rule_is_compared_with_a_step() -> None:
    assert STATE_TENSORS.keys() <= {kind for kind, _ in OPTIMIZERS}


class OwnAdam(Adam): ...


@pytest.mark.parametrize("kind", [LBFGS, OwnAdam])
def test_the_state_of_an_unknown_optimizer_is_unknown_before_a_step(kind: type[Any]) -> None:
    optimizer = kind(make_model().parameters(), lr=0.1)
    rows = memory_rows(make_model(), {"optimizer": optimizer}, "no", ShardCounts())
    assert ("optimizer", "unknown", f"state of {kind.__name__} after the first step") in rows
    assert rows[-1] == ("total", "168 B", "at least, without activations, which depend on the batch size")


def test_sharded_tensors_are_divided_and_buffers_are_not() -> None:
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.BatchNorm1d(511, affine=False))
    rows = memory_rows(model, {"optimizer": Adam(model.parameters())}, "no", ShardCounts(4, 2, 1))
    assert [(what, size) for what, size, _ in rows] == [
        ("weights", "64.0 KiB"),
        ("buffers", "4.0 KiB"),
        ("gradients", "128.0 KiB"),
        ("optimizer", "512.0 KiB"),
        ("total", "708.0 KiB"),
    ]
    assert rows[0][2] == "65,536 parameters in float32, sharded over 4 ranks"


def test_autocast_keeps_copies_of_weights_as_large_as_estimated() -> None:
    model = nn.Sequential(nn.Embedding(100, 10), nn.Linear(10, 70), nn.ReLU(), nn.Linear(70, 100))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.bfloat16 and tensor.numel() in (10 * 70, 70 * 100):
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(torch.arange(3)).sum()
    loss.backward()
    assert count_bytes(autocast_weights(model)) / 2 == sum(kept.values()) == 2 * (10 * 70 + 70 * 100)
