"""Devices that this machine lacks: supported by their module in torch, refused, or torch's default device."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from typing_extensions import override

from ptacc import CheckpointMixin, SeedMixin, Trainer
from ptacc.errors import LaunchError
from ptacc.samplers import LengthGrouped
from ptacc.tensors.devices import check_device, widest_float
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import run_ranks


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


class Saved(CheckpointMixin, SeedMixin, Trainer): ...


class Stream(IterableDataset[tuple[Tensor, ...]]):
    @override
    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        data = tiny_data(16)
        yield from (data[index] for index in range(16))


WORKERS: Any = {"num_workers": 1, "timeout": 30}
LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "shuffled": lambda: DataLoader(tiny_data(16), 4, shuffle=True),
    "in workers": lambda: DataLoader(tiny_data(16), 4, **WORKERS),
    "a sampler of torch's": lambda: DataLoader(
        tiny_data(16), 4, sampler=RandomSampler(range(16), replacement=True, num_samples=16)
    ),
    "of similar lengths": lambda: DataLoader(tiny_data(16), 4, sampler=LengthGrouped([*range(16)], 4)),
    "a stream": lambda: DataLoader(Stream(), 4),
    "a stream in workers": lambda: DataLoader(Stream(), 4, **WORKERS),
}


def train(loader: DataLoader[Any], parts: dict[str, Any], directory: Path) -> list[float]:
    trainer = Saved(**parts, seed=3, checkpoint_dir=directory)
    history = trainer.train(loader, tiny_data(), num_epochs=1, max_steps=4)
    return [step.loss for step in history.steps] + [history[-1].evaluations[""].loss]


@pytest.mark.parametrize("kind", LOADERS)
def test_a_run_does_not_depend_on_the_default_device(kind: str, tmp_path: Path) -> None:
    parts, loaders = [tiny_parts(), tiny_parts()], [LOADERS[kind](), LOADERS[kind]()]
    expected = train(loaders[0], parts[0], tmp_path / "expected")
    with torch.device("meta"):
        assert train(loaders[1], parts[1], tmp_path / "meta") == expected


def test_processes_do_not_depend_on_the_default_device(tmp_path: Path) -> None:
    def worker(device: str) -> list[float]:
        parts, loader = tiny_parts(), LOADERS["a stream"]()
        with torch.device(device):
            return train(loader, parts, tmp_path / device)

    assert run_ranks(worker, 2, "meta") == run_ranks(worker, 2, "cpu")
