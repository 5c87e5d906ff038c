"""DDP averages gradients as ptacc's own engine does, and has the settings of the options."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ptacc import DDPMixin, GradAccumMixin, SeedMixin, Trainer
from ptacc.engines.ddp import DDPEngine
from ptacc.errors import OptionError
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import run_ranks


class Replicated(SeedMixin, GradAccumMixin, Trainer): ...


class Wrapped(DDPMixin, Replicated): ...


def make_parts() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).double()
    return {**tiny_parts(), "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)}


def train(kind: type[Replicated], **options: Any) -> Tensor:
    torch.manual_seed(0)
    trainer = kind(**make_parts(), gradient_accumulation_steps=2, seed=0, **options)
    inputs, targets = tiny_data().tensors
    trainer.train(torch.utils.data.TensorDataset(inputs.double(), targets), num_epochs=3, per_device_batch_size=2)
    return torch.cat([value.double().reshape(-1) for value in trainer.model.state_dict().values()])


@pytest.mark.parametrize("option", [None, "ddp_find_unused_parameters", "ddp_gradient_as_bucket_view"])
def test_results_equal_those_of_replicas_that_are_not_wrapped(option: str | None) -> None:
    expected = run_ranks(lambda: train(Replicated), 2)[0]
    for state in run_ranks(lambda: train(Wrapped, **({option: True} if option else {})), 2):
        torch.testing.assert_close(state, expected, rtol=1e-12, atol=1e-12)


def settings() -> tuple[bool, bool, bool]:
    options: dict[str, Any] = {"ddp_find_unused_parameters": True, "ddp_gradient_as_bucket_view": True}
    trainer = Wrapped(**make_parts(), **options)
    trainer.train(tiny_data(), num_epochs=1)
    engine = trainer.run.engine
    assert isinstance(engine, DDPEngine)
    ddp = engine.ddp
    return ddp.find_unused_parameters, ddp.gradient_as_bucket_view, ddp.static_graph


def test_options_are_settings_of_ddp() -> None:
    assert run_ranks(settings, 2) == [(True, True, False)] * 2


def test_gradients_are_compressed_by_a_hook() -> None:
    exact = run_ranks(lambda: train(Wrapped), 2)[0]
    compressed = run_ranks(lambda: train(Wrapped, ddp_comm_hook="fp16"), 2)[0]
    assert 0 < (exact - compressed).abs().max() < 0.1


@pytest.mark.parametrize("options", [{"ddp_bucket_cap_mb": 0}, {"ddp_comm_hook": "int8"}], ids=str)
def test_an_invalid_option_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"Wrapped\\({next(iter(options))}="):
        Wrapped(**tiny_parts(), **options)
