import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from typing_extensions import override

from ptacc.model.averaging import AveragedWeights


class Buffered(nn.Module):
    """Has one buffer, of any value."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)


def average(model: Buffered, *values: Tensor, weight: float = 0.25) -> Tensor:
    """Return the average of a buffer that takes some values one after another."""
    averages = AveragedWeights(model)
    for value in values:
        model.value = value
        averages.update(model, weight)
    return averages.tensors["value"]


def test_floating_buffers_are_averaged_and_integers_are_the_models_own() -> None:
    model = nn.BatchNorm1d(2)
    averages, start = AveragedWeights(model), copy.deepcopy(model.state_dict())
    model(torch.randn(4, 2))
    averages.update(model, weight=0.25)
    expected = start["running_mean"].lerp(model.state_dict()["running_mean"], 0.25)
    with averages.applied(model):
        torch.testing.assert_close(model.state_dict()["running_mean"], expected)
        assert int(model.state_dict()["num_batches_tracked"]) == 1


def test_the_average_equals_torchs() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    averages = AveragedWeights(model)
    update = get_ema_multi_avg_fn(0.9)  # type: ignore[no-untyped-call]
    expected = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    expected.update_parameters(model)  # the first call copies
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        averages.update(model, weight=1 - 0.9)
        expected.update_parameters(model)
    for name, tensor in expected.module.named_parameters():
        torch.testing.assert_close(averages.tensors[name], tensor.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("weight", [0.001, 0.5, 1.0])
@pytest.mark.parametrize("start", [-math.inf, math.inf, math.nan, 0.0])
def test_an_infinite_entry_of_a_buffer_is_copied(start: float, weight: float) -> None:
    model = Buffered(torch.tensor([start, 2.0]))
    assert torch.equal(average(model, torch.tensor([-math.inf, 2.0]), weight=weight), torch.tensor([-math.inf, 2.0]))
    assert torch.isfinite(average(model, torch.tensor([1.0, 2.0]), weight=weight)).all()


def test_an_infinite_entry_of_a_parameter_stays() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-math.inf, 1.0]]))
    averages = AveragedWeights(model)
    with torch.no_grad():
        model.weight[0, 1] = 3.0
    averages.update(model, weight=0.5)
    assert averages.tensors["weight"].tolist() == [[-math.inf, 2.0]]


def test_complex_tensors_are_averaged() -> None:
    model = Buffered(torch.tensor([0j]))
    assert average(model, torch.tensor([4 + 8j])).tolist() == [1 + 2j]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_changes_are_not_rounded_away_in_16_bits(dtype: torch.dtype) -> None:
    model = Buffered(torch.ones(1, dtype=dtype))
    found = average(model, *[torch.full((1,), 2.0, dtype=dtype)] * 1000, weight=0.001)
    assert float(found) == pytest.approx(2 - 0.999**1000, rel=1e-4)


def test_applying_an_average_in_float32_to_16_bits_keeps_both() -> None:
    model = Buffered(torch.ones(1, dtype=torch.bfloat16))
    averages = AveragedWeights(model)
    model.value = torch.full((1,), 2.0, dtype=torch.bfloat16)
    averages.update(model, weight=0.001)
    with averages.applied(model):
        assert model.value.dtype == torch.bfloat16
    assert float(averages.tensors["value"]) == pytest.approx(1.001)
    assert float(model.value) == 2.0


def test_a_buffer_that_grows_is_copied_and_averaged_from_then_on() -> None:
    model = Buffered(torch.zeros(1))
    assert average(model, torch.full((2,), 4.0)).tolist() == [4.0, 4.0]
    assert average(model, torch.zeros(3), torch.full((3,), 4.0)).tolist() == [1.0, 1.0, 1.0]


def test_a_buffer_that_grows_within_the_block_stays() -> None:
    model = Buffered(torch.zeros(1))
    with AveragedWeights(model).applied(model):
        model.value = torch.ones(2)
    assert model.value.tolist() == [1.0, 1.0]


def test_a_module_that_is_added_joins_and_one_that_is_removed_leaves() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False))
    averages = AveragedWeights(model)
    model[0] = nn.Identity()
    model.append(nn.Linear(1, 1))
    averages.update(model, weight=0.5)
    assert averages.tensors.keys() == {"1.weight", "2.weight", "2.bias"}
    assert torch.equal(averages.tensors["2.weight"], model.get_parameter("2.weight"))


def test_lazy_modules_join_once_they_have_a_shape() -> None:
    model = nn.LazyLinear(1)
    averages = AveragedWeights(model)
    with averages.applied(model):
        model(torch.ones(1, 3))
    averages.update(model, weight=0.5)
    assert torch.equal(averages.tensors["weight"], model.weight)


def test_tensors_that_cannot_be_averaged_or_written_to_are_the_models_own() -> None:
    small = torch.ones(2).to(torch.float8_e4m3fn)
    for value in (small, torch.ones(1).expand(3), torch.tensor([True]), torch.ones(2, dtype=torch.int8)):
        model = Buffered(value)
        averages = AveragedWeights(model)
        averages.update(model, weight=0.5)
        with averages.applied(model):
            assert model.value is value


def test_averages_of_a_model_that_grew_are_saved_and_loaded() -> None:
    model = Buffered(torch.zeros(1))
    averages = AveragedWeights(model)
    model.value = torch.full((2,), 4.0)
    model.register_buffer("late", torch.ones(1))
    averages.update(model, weight=0.5)
    again = AveragedWeights(Buffered(torch.zeros(1)))
    again.load_state_dict(averages.state_dict())
    assert {name: value.tolist() for name, value in again.tensors.items()} == {"value": [4.0, 4.0], "late": [1.0]}
    again.update(model, weight=0.5)
    assert again.tensors["value"].tolist() == [4.0, 4.0]


def test_an_exception_in_the_block_restores_the_weights() -> None:
    model = nn.Linear(3, 2)
    averages = AveragedWeights(model)
    with torch.no_grad():
        model.weight.add_(1)
    raw = model.weight.detach().clone()
    with pytest.raises(KeyError), averages.applied(model):
        raise KeyError
    assert torch.equal(model.weight, raw)


def test_names_are_those_without_compilation() -> None:
    class Compiled(nn.Module):
        @override
        def __init__(self) -> None:
            super().__init__()
            self._orig_mod = nn.Linear(1, 1)

    assert AveragedWeights(Compiled()).tensors.keys() == {"weight", "bias"}
