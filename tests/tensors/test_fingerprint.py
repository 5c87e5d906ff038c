"""Two tensors have the same fingerprint if their bytes are the same."""

import pytest
import torch
from torch import Tensor

from ptacc.tensors.fingerprint import CHUNK, compute_fingerprint

VALUES = torch.arange(1.0, 2 * CHUNK + 8)


def replaced(index: int, value: float) -> Tensor:
    changed = VALUES.clone()
    changed[index] = value
    return changed


def swapped(first: int, second: int) -> Tensor:
    changed = VALUES.clone()
    changed[[first, second]] = VALUES[[second, first]]
    return changed


CHANGES = {
    "a sign": replaced(3, -4.0),
    "all signs": -VALUES,
    "the last bit": replaced(-1, float(torch.nextafter(VALUES[-1], torch.tensor(0.0)))),
    "two neighbours": swapped(4, 5),
    "two of one place in two chunks": swapped(0, 2 * CHUNK),
    "a zero more": torch.cat([VALUES, torch.zeros(1)]),
    "zeros": torch.zeros_like(VALUES),
}


@pytest.mark.parametrize("changed", CHANGES.values(), ids=CHANGES)
def test_a_change_of_any_value_or_place_changes_it(changed: Tensor) -> None:
    assert compute_fingerprint(changed) != compute_fingerprint(VALUES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool, torch.int8, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (5, 7)])
def test_it_does_not_depend_on_where_the_values_lie(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.arange(1, 100).to(dtype)[1:][: torch.Size(shape).numel()].view(shape)
    apart = torch.stack([values, values], dim=-1)[..., 0]
    assert compute_fingerprint(values) == compute_fingerprint(values.clone()) == compute_fingerprint(apart)
