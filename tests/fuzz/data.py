"""Training data of every kind for random compositions. Samples are pairs: float64 of shape (6,), and a class index."""

import os
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)
from torchdata.stateful_dataloader import StatefulDataLoader
from typing_extensions import override

from tests.fuzz.parts import CLASSES, FEATURES

os.environ["HF_HUB_OFFLINE"] = "1"  # read when `datasets` is imported
Sample = tuple[Tensor, Tensor]


def tensors(samples: int, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, FEATURES, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(CLASSES, (samples,), generator=generator))


class Own(Dataset[Sample]):
    """A dataset of one's own."""

    def __init__(self, samples: int) -> None:
        self.data = tensors(samples)

    def __len__(self) -> int:
        return len(self.data)

    @override
    def __getitem__(self, index: int) -> Sample:
        inputs, target = self.data[index]
        return inputs, target


class Noisy(Own):
    """Draws from all global generators."""

    @override
    def __getitem__(self, index: int) -> Sample:
        inputs, target = super().__getitem__(index)
        noise = random.random() + float(np.random.standard_normal())  # noqa: NPY002 - the global generator is meant
        return inputs + 0.1 * torch.randn(FEATURES) + 0.1 * noise, target


class Rare(Own):
    """Draws for some samples, from another generator for each of these."""

    @override
    def __getitem__(self, index: int) -> Sample:
        inputs, target = super().__getitem__(index)
        draws = (random.gauss, np.random.standard_normal, lambda: float(torch.randn(())))
        return inputs + (draws[index // 3 % 3]() if index % 3 == 1 else 0.0), target


class Batched(Own):
    """Is read in whole batches."""

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        return [self[index] for index in indices]


class Curriculum(Own):
    """Depends on the epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @override
    def __getitem__(self, index: int) -> Sample:
        inputs, target = super().__getitem__(index)
        return inputs * (1 + self.epoch), target


class Stream(IterableDataset[Sample]):
    """A stream without a place of its own, divided among workers."""

    def __init__(self, samples: int) -> None:
        self.data = tensors(samples)

    @override
    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for index in range(first, len(self.data), stride):
            inputs, target = self.data[index]
            yield inputs + 0.1 * torch.randn(FEATURES), target


class HuggingFaceStream(IterableDataset[Sample]):
    """A stream of `datasets`, which knows its place."""

    def __init__(self, samples: int) -> None:
        from datasets import Dataset as Table  # it takes a second to import

        data = tensors(samples)
        rows = [{"inputs": data[i][0].tolist(), "target": int(data[i][1])} for i in range(samples)]
        self.rows: Any = Table.from_list(rows).to_iterable_dataset(num_shards=2)

    @override
    def __iter__(self) -> Iterator[Sample]:
        for row in self.rows:
            yield torch.tensor(row["inputs"], dtype=torch.float64), torch.tensor(row["target"])

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.rows.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows.load_state_dict(state)


class SizedStream(Stream):
    def __len__(self) -> int:
        return len(self.data)


class StatefulStream(Stream):
    """A stream that knows its place, which it resets at the end."""

    place = 0

    @override
    def __iter__(self) -> Iterator[Sample]:
        if get_worker_info() is not None:
            yield from super().__iter__()
            return
        while self.place < len(self.data):
            self.place += 1
            inputs, target = self.data[self.place - 1]
            yield inputs, target
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


class Backwards(Sampler[int]):
    """A sampler of one's own, which depends on the epoch."""

    def __init__(self, samples: int) -> None:
        self.samples, self.epoch = samples, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.samples

    @override
    def __iter__(self) -> Iterator[int]:
        yield from [(index + self.epoch) % self.samples for index in reversed(range(self.samples))]


class Batches(DataLoader[Any]):
    """A loader of another type."""


def subset(samples: int, **options: Any) -> Subset[Any]:
    return Subset(tensors(samples + 3), list(range(samples))[::-1])


def concat(samples: int, **options: Any) -> ConcatDataset[Any]:
    return ConcatDataset([Own(samples - 2), tensors(2, seed=3)])


def weighted(samples: int, batch: int, workers: int) -> DataLoader[Sample]:
    sampler = WeightedRandomSampler([1.0 + index for index in range(samples)], samples)
    return DataLoader(Own(samples), batch, sampler=sampler, num_workers=workers)


def with_generator(samples: int, batch: int, workers: int) -> DataLoader[Sample]:
    sampler = RandomSampler(range(samples), generator=torch.Generator().manual_seed(3))
    return DataLoader(Noisy(samples), batch, sampler=sampler, num_workers=workers)


def in_batches(samples: int, batch: int, workers: int) -> DataLoader[Sample]:
    batches = BatchSampler(RandomSampler(range(samples)), batch, drop_last=False)
    return DataLoader(Own(samples), batch_sampler=batches, num_workers=workers)


DATASETS: Mapping[str, Callable[..., Any]] = {
    "tensors": lambda samples, **_: tensors(samples),
    "subset": subset,
    "own": lambda samples, **_: Own(samples),
    "noisy": lambda samples, **_: Noisy(samples),
    "rare": lambda samples, **_: Rare(samples),
    "batched": lambda samples, **_: Batched(samples),
    "curriculum": lambda samples, **_: Curriculum(samples),
    "concat": concat,
    "stream": lambda samples, **_: Stream(samples),
    "sized stream": lambda samples, **_: SizedStream(samples),
    "stateful stream": lambda samples, **_: StatefulStream(samples),
    "hugging face stream": lambda samples, **_: HuggingFaceStream(samples),
    "loader": lambda samples, batch, workers: DataLoader(Noisy(samples), batch, shuffle=True, num_workers=workers),
    "own sampler": lambda samples, batch, workers: DataLoader(
        Own(samples), batch, sampler=Backwards(samples), num_workers=workers
    ),
    "weighted": weighted,
    "generator": with_generator,
    "batch sampler": in_batches,
    "own loader": lambda samples, batch, workers: Batches(tensors(samples), batch),
    "own shuffled loader": lambda samples, batch, workers: Batches(Noisy(samples), batch, shuffle=True),
    "stateful loader": lambda samples, batch, workers: StatefulDataLoader(Rare(samples), batch, shuffle=True),
}
ITERABLE = frozenset({"stream", "sized stream", "stateful stream", "hugging face stream"})
READY = frozenset({"loader", "own sampler", "weighted", "generator", "batch sampler"})
OWN_BATCHES = frozenset({"own loader", "own shuffled loader", "stateful loader"})
