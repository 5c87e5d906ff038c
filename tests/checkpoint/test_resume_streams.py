"""A resumed run trains on the rest of a stream, whatever the stream's own state says about its position."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from ptacc import GradAccumMixin
from tests.checkpoint.resumed import Augmented
from tests.checkpoint.test_resume_data import Placed, Plain, drawn, interrupted, leg
from tests.ranks import run_ranks

os.environ["HF_HUB_OFFLINE"] = "1"  # read when `datasets` is imported
pytestmark = pytest.mark.filterwarnings("ignore:.*The stream is read again from its beginning")


class Accumulating(GradAccumMixin, Plain):
    gradient_accumulation_steps: int = 2


def rows(samples: int = 18, shards: int = 1) -> Any:
    import datasets

    inputs = torch.randn(samples, 6, generator=torch.Generator().manual_seed(3)).tolist()
    data = datasets.Dataset.from_dict({"x": inputs, "y": [index % 2 for index in range(samples)]})
    return data.to_iterable_dataset(num_shards=shards)


def shuffled(buffer_size: int = 16) -> Any:
    return rows().shuffle(seed=1, buffer_size=buffer_size)


def interleaved() -> Any:
    import datasets

    return datasets.interleave_datasets([rows(9), shuffled(4)], stopping_strategy="all_exhausted")


def pair(samples: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, labels = ([sample[name] for sample in samples] for name in ("x", "y"))
    return torch.tensor(inputs, dtype=torch.float64), torch.tensor(labels)


def doubled(table: dict[str, Any]) -> dict[str, Any]:
    return {"x": [[2 * number for number in row] for row in table["x"]], "y": table["y"]}


class Within(IterableDataset[Any]):
    """A dataset of one's own, whose state is that of a stream within it."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    @override
    def __iter__(self) -> Iterator[Any]:
        yield from self.stream

    def state_dict(self) -> Any:
        return {"stream": self.stream.state_dict()}

    def load_state_dict(self, state_dict: Any) -> None:
        self.stream.load_state_dict(state_dict["stream"])


STREAMS: dict[str, Callable[[], Any]] = {
    "in order": rows,
    "of several shards": lambda: rows(18, 3),
    "shuffled": shuffled,
    "shuffled in a small buffer": lambda: shuffled(3),
    "looked at before": lambda: [stream := shuffled(), next(iter(stream))][0],
    "mapped in batches": lambda: rows().map(doubled, batched=True, batch_size=5),
    "interleaved": interleaved,
    "shuffled and cut": lambda: shuffled().take(14),
    "within another": lambda: Within(rows(18, 3)),
    "shuffled, within another": lambda: Within(shuffled()),
}


def loader(kind: str, batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(STREAMS[kind](), batch_size=batch_size, collate_fn=pair)


@pytest.mark.parametrize("kind", list(STREAMS))
@pytest.mark.parametrize("trainer", [Plain, Accumulating])
def test_a_stream_of_datasets_resumes(tmp_path: Path, kind: str, trainer: type[Plain]) -> None:
    whole = leg(tmp_path / "whole", None, loader(kind), trainer)
    assert interrupted(tmp_path / "legs", [1, 3, 4, 6, 8, None], lambda: loader(kind), trainer) == whole


@pytest.mark.timeout(120)
def test_a_shuffled_stream_resumes_on_two_processes(tmp_path: Path) -> None:
    def worker(directory: Path, stops: list[int | None]) -> Any:
        return interrupted(directory, stops, lambda: loader("shuffled", 2), Accumulating)

    stops: list[list[int | None]] = [[None], [2, 3, 5, None]]
    whole, legs = (run_ranks(worker, 2, tmp_path / f"{len(until)}", until) for until in stops)
    assert legs == whole


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_short_last_window_ends_the_epoch_of_a_stream_that_resets_its_position(tmp_path: Path, stop: int) -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(Placed(), batch_size=6)  # 18 samples: three full batches, two windows

    whole = leg(tmp_path / "whole", None, make(), Accumulating)
    assert interrupted(tmp_path / "legs", [stop, None], make, Accumulating) == whole


def stateful_loader(data: str, **options: Any) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    if data == "map-style":
        return StatefulDataLoader(Augmented(), 4, shuffle=True, generator=drawn(), **options)
    return StatefulDataLoader(STREAMS[data](), 4, collate_fn=pair, **options)


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it
@pytest.mark.parametrize("data", ["in order", "shuffled", "map-style"])
@pytest.mark.parametrize(("workers", "every"), [(0, 1), pytest.param(2, 1, marks=pytest.mark.prove), (2, 3)])
def test_a_stateful_dataloader_resumes(tmp_path: Path, data: str, workers: int, every: int) -> None:
    def make() -> Any:
        return stateful_loader(data, num_workers=workers, snapshot_every_n_steps=every)

    whole = leg(tmp_path / "whole", None, make(), Accumulating)
    assert interrupted(tmp_path / "legs", [1, 3, 5, None], make, Accumulating) == whole


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("data", ["shuffled", "map-style"])
def test_a_stateful_dataloader_resumes_on_two_processes(tmp_path: Path, data: str) -> None:
    def worker(directory: Path, stops: list[int | None]) -> Any:
        return interrupted(directory, stops, lambda: stateful_loader(data), Plain)

    stops: list[list[int | None]] = [[None], [1, 3, None]]
    whole, legs = (run_ranks(worker, 2, tmp_path / f"{len(until)}", until) for until in stops)
    assert legs == whole
