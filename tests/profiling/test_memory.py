"""What memory holds when it runs out."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.optim import Adam

from ptacc.profiling import memory
from ptacc.profiling.memory import GIB, describe_memory, format_kinds, is_out_of_memory, name_tensors, sizes_by_kind

CPU = torch.device("cpu")


def trained() -> tuple[nn.Module, Adam]:
    """Return a model with a buffer and an optimizer with state, after a step."""
    model = nn.Sequential(nn.Linear(4, 256), nn.BatchNorm1d(256))
    optimizer = Adam(model.parameters())
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_a_failed_allocation_on_the_host_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_out_of_memory(caught.value)


def test_weights_gradients_and_optimizer_states_are_named() -> None:
    model, optimizer = trained()
    names = {name for name, _ in name_tensors(model, [optimizer])}
    assert names >= {
        "weights: 0.weight",
        "gradients: 0.weight",
        "buffers: 1.running_mean",
        "optimizer state: exp_avg of 0.weight",
    }


def test_memory_is_added_up_by_kind() -> None:
    model, optimizer = trained()
    sizes = sizes_by_kind(dict(name_tensors(model, [optimizer])))
    weights = 4 * (4 * 256 + 3 * 256)
    assert (sizes["weights"], sizes["gradients"]) == (weights, weights)
    assert sizes["optimizer state"] == 2 * weights + 4 * 4  # two moments, and a count of steps for each parameter


def test_the_rest_of_what_is_allocated_is_shown() -> None:
    assert format_kinds({"weights": GIB, "gradients": GIB // 2}, 4 * GIB, 5 * GIB) == [
        "memory: weights 1.00 GiB, gradients 512.0 MiB, rest (activations, batches, others) 2.50 GiB",
        "allocated: 4.00 GiB, peak 5.00 GiB",
    ]


def test_the_largest_tensors_are_listed_with_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LARGEST", 10_000)  # with those that other tests have left
    model = nn.Linear(1 << 10, (1 << 12) + 1, bias=False)
    other = torch.zeros((1 << 23) + 1)
    lines = describe_memory(CPU, model, [])
    weight = lines.index("  16.0 MiB  float32 (4097, 1024)  weights: weight")
    assert lines.index("  32.0 MiB  float32 (8388609,)  unnamed") < weight < len(lines) - 1
    assert other.numel() == (1 << 23) + 1


def test_tensors_on_other_devices_are_left_out() -> None:
    elsewhere: Tensor = torch.empty(1 << 40, device="meta")
    assert not [line for line in describe_memory(CPU, nn.Linear(2, 2), []) if "TiB" in line or "1024.00 GiB" in line]
    assert elsewhere.is_meta


def test_tensors_without_memory_are_left_out() -> None:
    """`torch.compile` leaves such tensors. Symbols of two traces cannot be compared."""
    traced = [FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.empty(5, 7)) for _ in range(2)]
    with FakeTensorMode():
        fake = torch.empty(1 << 40)
    lines = describe_memory(CPU, nn.Linear(2, 2), [])
    assert lines[1] == "largest tensors:"
    assert "(1099511627776,)" not in "\n".join(lines)
    assert {tensor.device.type for tensor in (fake, *traced)} == {"cpu"}


def test_memory_is_described_within_vmap() -> None:
    model = nn.Linear(2, 2)

    def describe(tensor: Tensor) -> Tensor:
        assert describe_memory(CPU, model, [])
        return tensor.sum()

    torch.vmap(describe)(torch.ones(2, 3))


def test_a_sparse_gradient_counts_what_it_holds() -> None:
    model = nn.Embedding(10**6, 4, sparse=True)
    model(torch.tensor([[1, 5]])).sum().backward()
    assert sizes_by_kind(dict(name_tensors(model, []))) == {"weights": 16 * 10**6, "gradients": 2 * (8 + 4 * 4)}
    assert describe_memory(CPU, model, [])
