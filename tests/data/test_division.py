"""Data that is divided between the processes already is recognised, or refused by name."""

import importlib
import math
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler, Subset
from typing_extensions import override

from ptacc import StepOutput, TrainingLoop
from ptacc.data.division import is_close, summarize
from tests.ranks import run_ranks

os.environ["HF_HUB_OFFLINE"] = "1"  # read when `datasets` is imported
pytestmark = pytest.mark.timeout(120)


class Seeing(TrainingLoop[dict[str, Tensor], Tensor]):
    @override
    def train_step(self, batch: dict[str, Tensor]) -> StepOutput[Tensor]:
        SEEN.extend(batch["x"].tolist())
        outputs = self.model(batch["x"][:, None].float())
        return StepOutput(loss=outputs.mean(), outputs=outputs)


SEEN: list[int] = []


class Numbers(Dataset[dict[str, int]]):
    def __len__(self) -> int:
        return 16

    @override
    def __getitem__(self, index: int) -> dict[str, int]:
        return {"x": index}


class Splitting(IterableDataset[dict[str, int]]):
    """Asks torch.distributed for its part."""

    @override
    def __iter__(self) -> Iterator[dict[str, int]]:
        yield from ({"x": index} for index in range(dist.get_rank(), 16, dist.get_world_size()))


class Unseeded(IterableDataset[dict[str, int]]):
    @override
    def __iter__(self) -> Iterator[dict[str, int]]:
        yield from ({"x": index} for index in random.SystemRandom().sample(range(10**6), 16))


class EveryOther(Sampler[int]):
    """Has a rank, as the distributed samplers of other packages, and no common base class."""

    def __init__(self, dataset: Numbers, num_replicas: int, rank: int) -> None:
        self.dataset, self.num_replicas, self.rank = dataset, num_replicas, rank

    def __len__(self) -> int:
        return len(self.dataset) // self.num_replicas

    @override
    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))


class OwnNoise(Numbers):
    """Every process draws other noise."""

    @override
    def __getitem__(self, index: int) -> Any:
        return {"x": index + random.SystemRandom().random()}


def node_part(rank: int, streams: bool = True) -> Any:
    from datasets import Dataset as Rows
    from datasets.distributed import split_dataset_by_node

    rows: Any = Rows.from_dict({"x": list(range(16))})
    data: Any = rows.to_iterable_dataset(num_shards=2) if streams else rows
    return split_dataset_by_node(data, rank, 2)


class Unordered(DataLoader[Any]):
    """A loader of its own type, whose order differs between processes."""

    @override
    def __iter__(self) -> Any:
        order = random.SystemRandom().sample(range(10**6), 16)
        return iter([{"x": torch.tensor([index])} for index in order])


DIVIDED: dict[str, Callable[[int], Any]] = {
    "a stream of datasets": node_part,
    "rows of datasets": lambda rank: node_part(rank, streams=False),
    "a stream that splits itself": lambda rank: Splitting(),
    "a stream that splits itself, with workers": lambda rank: DataLoader(Splitting(), 2, num_workers=1, timeout=30),
    "a stream in an order without a seed": lambda rank: Unseeded(),
    "a loader in an order without a seed": lambda rank: Unordered(Numbers()),
    "a stream of batches that splits itself": lambda rank: DataLoader(Splitting(), None, collate_fn=singleton),
    "a subset for each rank": lambda rank: Subset(Numbers(), range(rank, 16, 2)),
    "a sampler for other processes": lambda rank: DataLoader(
        Numbers(), 2, sampler=DistributedSampler(Numbers(), num_replicas=4, rank=rank)
    ),
    "a sampler of one rank": lambda rank: DataLoader(
        Numbers(), 2, sampler=DistributedSampler(Numbers(), num_replicas=2, rank=0)
    ),
}


def singleton(row: Any) -> dict[str, Tensor]:
    return {"x": torch.tensor([row["x"]])}


def train(make: Callable[[int], Any], evaluate: bool = False, **options: Any) -> list[int]:
    """Train or evaluate on two processes, and return the samples that they saw together."""

    def worker() -> list[int]:
        SEEN.clear()
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
        trainer = Seeing(model, optimizer=optimizer, default_callbacks=())
        data = make(trainer.distributed.rank)
        if evaluate:
            trainer.evaluate(data)
        else:
            trainer.train(data, max_steps=100, num_epochs=1, **options)
        return [*SEEN]

    return sorted(number for seen in run_ranks(worker, 2, timeout=60) for number in seen)


@pytest.mark.parametrize("kind", list(DIVIDED))
def test_data_that_is_divided_already_is_refused_by_name(kind: str) -> None:
    with pytest.raises(Exception, match=r"different samples from (\w+).*data_is_sharded|gives part \d of \d to rank"):
        train(DIVIDED[kind])


def test_an_evaluation_set_that_is_divided_already_is_refused() -> None:
    with pytest.raises(Exception, match="different samples from IterableDataset"):
        train(node_part, evaluate=True)


@pytest.mark.parametrize("kind", ["a stream of datasets", "rows of datasets", "a stream that splits itself"])
def test_divided_data_is_seen_in_full_where_it_is_said_to_be(kind: str) -> None:
    assert train(DIVIDED[kind], data_is_sharded=True) == [*range(16)]


def test_strings_are_compared_where_there_are_no_tensors() -> None:
    assert summarize(["a", b"b"]) == summarize({"left": "a", "right": "b"})
    assert not is_close(summarize(["a", "b"]), summarize(["a", "c"]))
    assert summarize(["/here/1.png", torch.ones(1)]) == summarize(["/there/1.png", torch.ones(1)])


def test_nan_is_equal_to_nan_alone() -> None:
    assert is_close([1.0, math.nan], [1.0, math.nan])
    assert not is_close([1.0, math.nan], [1.0, 2.0])
    assert not is_close([1.0], [1.0, 2.0])


def test_samples_that_every_process_draws_for_itself_are_not_refused() -> None:
    assert [int(number) for number in train(lambda rank: OwnNoise())] == [*range(16)]


@pytest.mark.parametrize("kind", ["torch's", "without batches", "Accelerate's", "torchdata's", "another"])
def test_a_sampler_that_divides_is_recognised(kind: str) -> None:
    prepare: Any = importlib.import_module("accelerate.data_loader").prepare_data_loader
    from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

    def make(rank: int) -> Any:
        if kind == "Accelerate's":
            return prepare(DataLoader(Numbers(), 2), num_processes=2, process_index=rank)
        kinds: dict[str, Any] = {"torchdata's": StatefulDistributedSampler, "another": EveryOther}
        sampler = kinds.get(kind, DistributedSampler)(Numbers(), 2, rank)
        if kind == "without batches":
            return DataLoader(Numbers(), None, sampler=sampler, collate_fn=singleton)
        return DataLoader(Numbers(), 2, sampler=sampler)

    assert train(make) == [*range(16)]


def test_a_loader_that_sends_each_process_its_part_is_refused() -> None:
    prepare: Any = importlib.import_module("accelerate.data_loader").prepare_data_loader

    def make(rank: int) -> Any:
        return prepare(
            DataLoader(Numbers(), 2),
            num_processes=2,
            process_index=rank,
            dispatch_batches=True,
            put_on_device=True,
            device=torch.device("cpu"),
        )

    with pytest.raises(Exception, match="prepared by Accelerate"):
        train(make)
