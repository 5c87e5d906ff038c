"""The mean of losses is read when it has arrived on the host."""

import math
from types import SimpleNamespace

import pytest
import torch

from ptacc.run.running_loss import RunningLoss
from tests.devices import PendingEvent


def test_on_the_cpu_the_mean_is_over_all_items_in_float64() -> None:
    losses = RunningLoss(torch.device("cpu"))
    losses.add(torch.tensor(1.0), 2)
    losses.add(torch.tensor(1e-12), 6)
    assert losses.read() == (2 + 6 * torch.tensor(1e-12).item()) / 8


def test_after_a_reset_the_mean_is_over_later_items() -> None:
    losses = RunningLoss(torch.device("cpu"))
    losses.add(torch.tensor(math.nan), 2)
    losses.reset()
    losses.add(torch.tensor(3.0), 1)
    assert losses.read() == 3.0


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_on_other_devices_a_mean_is_read_when_its_copy_has_arrived(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pending: list[object] = []
    monkeypatch.setattr(torch.get_device_module(kind), "Event", lambda: PendingEvent(pending))
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, **place: torch.ones(*shape, dtype=dtype) * 0)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda _: SimpleNamespace(has_fp64=True))
    losses, read = RunningLoss(torch.device(kind)), []
    for loss in (1.0, 2.0):
        losses.add(torch.tensor(loss), 2)
        read.append(losses.read())  # the copy of 1.0 has not arrived
    pending.clear()
    losses.add(torch.tensor(3.0), 2)
    assert [*read, losses.read(), len(pending)] == [None, None, 1.0, 1]
