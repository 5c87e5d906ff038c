"""Copying batches to the device, as far as it can be tested on the CPU; `tests/gpu` has the rest."""

from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import Dataset, IterableDataset
from transformers import BatchEncoding
from typing_extensions import override

from ptacc.data.dataloader_config import DataLoaderConfig
from ptacc.data.loading import Pinnable, unwrap_batch
from ptacc.data.sources import make_source
from ptacc.data.transfer import Transfer, have_same_layout, make_transfer
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.tensors.structures import leading_dimension, pin_memory, to_device
from ptacc.types.arguments import DataLoaderKwargs

META = torch.device("meta")


@dataclass
class Tokens:
    ids: Tensor
    texts: list[str]


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class Graph:
    """Moves and pins itself. Its tensors are hidden."""

    def __init__(self, *path: str) -> None:
        self.path = path

    def to(self, device: torch.device) -> "Graph":
        return Graph(*self.path, str(device))

    def pin_memory(self) -> "Graph":
        return Graph(*self.path, "pinned")


class Sentences(Dataset[str]):
    def __len__(self) -> int:
        return 5

    @override
    def __getitem__(self, index: int) -> str:
        if index >= len(self):
            raise IndexError(index)
        return "abcde"[index]


class SentenceStream(IterableDataset[str]):
    @override
    def __iter__(self) -> Iterator[str]:
        return iter("abcde")


def collate_tokens(samples: list[Any]) -> Tokens:
    return Tokens(torch.tensor([ord(sample) for sample in samples]), samples)


# ---- moving


def test_on_the_cpu_a_batch_is_not_copied() -> None:
    transfer = make_transfer(torch.device("cpu"))
    batch = [torch.ones(2)]
    assert type(transfer) is Transfer
    assert transfer.to_device(batch) is batch


def test_a_batch_is_copied_to_another_device() -> None:
    assert make_transfer(META).to_device([torch.ones(2)])[0].device == META


def test_a_batch_moves_with_all_its_parts() -> None:
    batch = {"tokens": Tokens(torch.ones(2), ["a", "b"]), "pair": Pair(torch.ones(1), torch.ones(3))}
    moved: Any = to_device(batch, META)
    assert moved["tokens"].ids.device == moved["pair"].right.device == META
    assert moved["tokens"].texts == ["a", "b"]
    assert type(moved["pair"]) is Pair


def test_parts_with_a_to_method_move_themselves() -> None:
    graph, rest = to_device((Graph(), [torch.ones(1)]), META)
    assert isinstance(graph, Graph)
    assert graph.path == ("meta",)
    assert isinstance(rest, list)
    assert rest[0].device == META


def test_packed_sequences_keep_their_sizes_on_the_host() -> None:
    packed: PackedSequence = pack_sequence([torch.ones(3), torch.ones(2)])
    moved, _ = to_device((packed, torch.ones(1)), META)
    assert isinstance(moved, PackedSequence)
    assert moved.data.device == META
    assert moved.batch_sizes.device.type == "cpu"


MAPPINGS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "BatchEncoding": BatchEncoding,
    "UserDict": UserDict,
    "MappingProxyType": MappingProxyType,
    "OrderedDict": OrderedDict,
}


@pytest.mark.parametrize("kind", MAPPINGS)
def test_mappings_are_moved_and_pinned_with_their_class(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = MAPPINGS[kind]({"ids": torch.ones(2), "mask": torch.ones(3)})
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.neg)  # there is no pinned memory without a GPU
    pinned = pin_memory(batch)
    assert type(pinned) is type(batch)
    assert all((pinned[name] < 0).all() and (batch[name] > 0).all() for name in ("ids", "mask"))
    moved = to_device(batch, META)
    assert type(moved) is type(batch)
    assert {moved["ids"].device, moved["mask"].device} == {META}


@pytest.mark.parametrize(
    "batch", [BatchEncoding({"ids": torch.ones(2), "mask": torch.ones(3)}), pack_sequence([torch.ones(2)])]
)
def test_parts_that_move_themselves_do_not_wait_for_the_copies(batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[bool] = []
    move = Tensor.to

    def recorded(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        waits.append(not kwargs.get("non_blocking", False))
        return move(tensor, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", recorded)
    to_device(batch, META)
    assert waits
    assert not any(waits)


def test_sequences_are_counted_also_within_a_mapping() -> None:
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    assert leading_dimension({"words": packed}) == leading_dimension((packed,)) == 2


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (torch.ones(4, 6), True),
        (torch.ones(3, 6), False),
        (torch.ones(4, 6, dtype=torch.float64), False),
        (torch.ones(6, 4).T, False),
    ],
)
def test_a_buffer_is_reused_for_tensors_of_the_same_layout(other: Tensor, expected: bool) -> None:
    assert have_same_layout(torch.zeros(4, 6), other) is expected


# ---- pinning


@pytest.mark.parametrize(("device", "expected"), [("cpu", False), ("cuda", True), ("mps", False)])
def test_a_loader_for_a_gpu_pins(device: str, expected: bool) -> None:
    request = DataLoaderConfig(Sentences(), 2, None, {}, torch.device(device))
    assert request.build(shuffle=False).pin_memory is expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("pins", [True, False])
def test_the_users_pin_memory_is_kept(device: str, pins: bool) -> None:
    request = DataLoaderConfig(Sentences(), 2, None, {"pin_memory": pins}, torch.device(device))
    assert request.build(shuffle=False).pin_memory is pins


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("dataset", [Sentences(), SentenceStream()])
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_batches_of_a_pinning_loader_are_unwrapped(dataset: Any, workers: int) -> None:
    kwargs: DataLoaderKwargs = {"pin_memory": True, "num_workers": workers}
    source = make_source(
        DataLoaderConfig(dataset, 2, collate_tokens, kwargs).build(shuffle=False), DistributedRuntime(), seed=1
    )
    batches = [host.data for host in source.epoch(0)]
    assert [batch.texts for batch in batches] == [["a", "b"], ["c", "d"], ["e"]]
    assert all(type(batch) is Tokens and batch.ids[0] == ord(batch.texts[0]) for batch in batches)


def test_parts_with_a_pin_memory_method_pin_themselves() -> None:
    batch: tuple[Graph, list[Graph]] = pin_memory((Graph(), [Graph()]))
    assert [batch[0].path, batch[1][0].path] == [("pinned",), ("pinned",)]
    graph: Any = unwrap_batch(Pinnable(Graph()).pin_memory())
    assert graph.path == ("pinned",)
