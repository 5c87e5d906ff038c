"""Devices that this machine lacks: they are supported by the module that torch has for them, or refused."""

from types import SimpleNamespace

import pytest
import torch

from ptacc.errors import LaunchError
from ptacc.tensors.devices import check_device, widest_float


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps", "xpu"])
def test_devices_of_torch_are_supported(kind: str) -> None:
    check_device(torch.device(kind))


@pytest.mark.parametrize("kind", ["xla", "hpu"])
def test_a_device_without_events_and_generators_is_refused_by_name(kind: str) -> None:
    with pytest.raises(LaunchError, match=f"device of type '{kind}'.* it needs torch.{kind}.Event, torch.{kind}.get_"):
        check_device(torch.device(kind))


@pytest.mark.parametrize(
    ("kind", "expected"), [("cpu", torch.float64), ("cuda", torch.float64), ("mps", torch.float32)]
)
def test_sums_have_the_widest_dtype_of_the_device(kind: str, expected: torch.dtype) -> None:
    assert widest_float(torch.device(kind)) is expected


@pytest.mark.parametrize(("has_fp64", "expected"), [(True, torch.float64), (False, torch.float32)])
def test_xpus_differ_in_float64(has_fp64: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda _: SimpleNamespace(has_fp64=has_fp64))
    assert widest_float(torch.device("xpu")) is expected
