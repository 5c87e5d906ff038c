"""The search for a batch size, with real errors of a GPU whose memory is limited."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from ptacc import GradAccumMixin, Trainer
from ptacc.tuning.batch_size import find_batch_size
from tests.gpu.parts import make_data, make_net

SAMPLES, WIDE = 16_384, 4096


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Leave 4 GiB to this process."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 4 * 2**30 / total))
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


class Accumulating(GradAccumMixin, Trainer): ...


def test_a_size_that_fits_is_found_and_the_model_stays_as_it_was(device: torch.device) -> None:
    net, data = make_net(WIDE, WIDE, layers=6), make_data(SAMPLES, WIDE)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    trainer = Accumulating(
        net, loss_func=nn.CrossEntropyLoss(), optimizer=AdamW(net.parameters()), default_callbacks=()
    )
    found = find_batch_size(trainer, data, global_batch_size=SAMPLES, margin=0.0)
    assert found.did_not_fit
    assert all(torch.equal(one, other) for one, other in zip(before, net.parameters(), strict=True))
    trainer.gradient_accumulation_steps = found.gradient_accumulation_steps
    trainer.train(data, max_steps=2, per_device_batch_size=found.per_device_batch_size)
    assert trainer.device.type == device.type
