"""Outputs and gradients of batch norm over several processes, compared with autograd over the concatenated batch."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ptacc.model.batch_norm import global_batch_norm
from tests.ranks import run_ranks

SHAPES = [(3, 4, 5), (1, 4, 5), (2, 4, 5), (2, 4, 5)]
PADDING_RANK = 3


def parts_of_a_batch(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Return inputs far from zero, and gradients of the outputs, for each process."""
    generator = torch.Generator().manual_seed(0)
    pairs = [[torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)] for shape in SHAPES]
    return [((3 + inputs).to(dtype), gradients.to(dtype)) for inputs, gradients in pairs]


def make_norm() -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(4, dtype=torch.float64)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return norm


def normalise_a_part(dtype: torch.dtype, norm_dtype: torch.dtype) -> dict[str, Tensor]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    inputs, gradients = parts_of_a_batch(dtype)[rank]
    inputs.requires_grad_()
    norm = make_norm().to(norm_dtype)
    outputs = global_batch_norm(inputs, norm, is_padding=rank == PADDING_RANK)
    # The loop scales the loss of a padding batch by 0.
    outputs.backward(gradients * (rank != PADDING_RANK))  # type: ignore[no-untyped-call]
    assert inputs.grad is not None
    found = {"outputs": outputs.detach(), "inputs": inputs.grad}
    for name, parameter in norm.named_parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        found[name] = parameter.grad
    return found | dict(norm.named_buffers())


def concatenated_batch(dtype: torch.dtype, norm_dtype: torch.dtype) -> dict[str, Tensor]:
    real = parts_of_a_batch(dtype)[:PADDING_RANK]
    inputs = torch.cat([part for part, _ in real]).requires_grad_()
    norm = make_norm().to(norm_dtype)
    outputs = norm(inputs)
    outputs.backward(torch.cat([gradients for _, gradients in real]))
    assert inputs.grad is not None
    found = {"outputs": outputs.detach(), "inputs": inputs.grad}
    found |= {name: parameter.grad for name, parameter in norm.named_parameters() if parameter.grad is not None}
    return found | dict(norm.named_buffers())


@pytest.mark.parametrize(
    ("dtype", "norm_dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-14),
        (torch.float32, torch.float32, 1e-6),
        (torch.bfloat16, torch.float32, 1e-2),
        (torch.bfloat16, torch.bfloat16, 1e-2),
    ],
)
def test_outputs_and_gradients_are_those_of_the_concatenated_batch(
    dtype: torch.dtype, norm_dtype: torch.dtype, tolerance: float
) -> None:
    expected = concatenated_batch(dtype, norm_dtype)
    ranks = run_ranks(normalise_a_part, len(SHAPES), dtype, norm_dtype)
    assert not ranks[PADDING_RANK]["inputs"].any()
    for name in ("outputs", "inputs"):
        parts = torch.cat([rank.pop(name) for rank in ranks[:PADDING_RANK]])
        assert parts.dtype == dtype
        assert distance(parts, expected.pop(name)) <= tolerance, name
    for rank, name in itertools.product(ranks, expected):
        assert rank[name].dtype == expected[name].dtype
        assert distance(rank[name], expected[name]) <= tolerance, name


def distance(ours: Tensor, plain: Tensor) -> float:
    ours, plain = ours.double(), plain.double()
    return float((ours - plain).norm()) / (float(plain.norm()) or 1.0)
