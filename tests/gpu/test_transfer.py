"""Batches are copied from pinned memory during a slow computation, and arrive intact."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from transformers import BatchEncoding
from typing_extensions import override

from ptacc import Pair, StepOutput, Trainer, TrainingLoop
from ptacc.data.transfer import MIN_STREAMED_BYTES, StreamedTransfer
from ptacc.tensors.structures import pin_memory, to_device
from tests.gpu.parts import make_data, make_net
from tests.gpu.waits import Waits

CYCLES = 5_000_000
"""A GPU sleeps a few milliseconds in them: far longer than the host needs for a step."""
SAMPLES, WIDE = 162, MIN_STREAMED_BYTES // 16
"""Each batch of 16 samples of this width has more than is worth a stream, the last one, of 2, has less."""
BATCHES = 11


def sleep(device: torch.device, cycles: int = CYCLES) -> None:
    if device.type == "cuda":
        torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]  # noqa: SLF001  # used by torch's own tests


class RecordsExtremes(Trainer):
    """Records the extremes of each batch late, when the copy of the next batch has begun."""

    seen: list[Tensor] = field(init=False, default_factory=list)

    def record(self, batch: Pair) -> StepOutput[Tensor]:
        sleep(self.device)
        self.seen.append(torch.stack([*batch[0].aminmax(), batch[1].min(), batch[1].max()]))
        outputs = self.model(batch[0][:, :1])
        return StepOutput(loss=outputs.square().mean(), outputs=outputs)

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        return self.record(batch)

    @override
    def eval_step(self, batch: Pair) -> StepOutput[Tensor]:
        return self.record(batch)

    @override
    def predict_step(self, batch: Any) -> Tensor:
        return self.record(batch).outputs


def make_parts() -> tuple[RecordsExtremes, TensorDataset, dict[str, Any]]:
    """Return a trainer, data with one number per batch, and options of its loading."""
    net = nn.Linear(1, 1)
    trainer = RecordsExtremes(
        net, loss_func=nn.MSELoss(), optimizer=SGD(net.parameters(), lr=1e-9), default_callbacks=()
    )
    numbers = torch.arange(SAMPLES) // 16
    data = TensorDataset(numbers.float()[:, None].expand(-1, WIDE), numbers.float())
    return trainer, data, {"per_device_batch_size": 16}


CALLS: dict[str, Callable[[RecordsExtremes, TensorDataset, dict[str, Any]], object]] = {
    "train": lambda trainer, data, how: trainer.train(
        data, num_epochs=1, train_dataloader_kwargs={"shuffle": False}, **how
    ),
    "evaluate": lambda trainer, data, how: trainer.evaluate(data, **how),
    "predict": lambda trainer, data, how: trainer.predict(data, **how),
}


@pytest.mark.parametrize("call", CALLS)
def test_batches_arrive_intact_during_a_slow_computation(device: torch.device, call: str) -> None:
    trainer, data, how = make_parts()
    CALLS[call](trainer, data, how)
    assert trainer.device.type == device.type
    assert [numbers.tolist() for numbers in trainer.seen] == [[index] * 4 for index in range(BATCHES)]


def test_a_batch_is_copied_while_the_previous_one_is_computed(device: torch.device) -> None:
    transfer = StreamedTransfer(device)
    first, second, looked = (torch.randn(MIN_STREAMED_BYTES).pin_memory() for _ in range(3))
    transfer.to_device(first)
    sleep(device, 200 * CYCLES)
    computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
    computed.record()
    copied = transfer.to_device(second)
    has_come = False
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        while not has_come and not computed.query():  # type: ignore[no-untyped-call]
            looked.copy_(copied, non_blocking=True)
            torch.cuda.current_stream().synchronize()
            has_come = torch.equal(looked, second)
    assert has_come
    assert torch.equal(copied.cpu(), second)


@pytest.mark.usefixtures("deterministic")
def test_pinned_memory_changes_no_weight(device: torch.device) -> None:
    def weights(*, pins: bool) -> list[Tensor]:
        net = make_net(features=WIDE)
        trainer = Trainer(
            net, loss_func=nn.CrossEntropyLoss(), optimizer=SGD(net.parameters(), lr=0.1), default_callbacks=()
        )
        kwargs: Any = {"shuffle": False, "pin_memory": pins}
        trainer.train(make_data(SAMPLES, WIDE), num_epochs=2, per_device_batch_size=16, train_dataloader_kwargs=kwargs)
        return [parameter.detach() for parameter in trainer.model.parameters()]

    pinned, plain = weights(pins=True), weights(pins=False)
    assert {weight.device.type for weight in pinned} == {device.type}
    assert all(torch.equal(one, other) for one, other in zip(pinned, plain, strict=True))


def test_a_batch_encoding_is_copied_without_waiting(device: torch.device) -> None:
    batch, waits = pin_memory(BatchEncoding({"ids": torch.ones(4), "mask": torch.ones(4)})), Waits()
    assert batch["ids"].is_pinned()
    with waits.counted():
        moved = to_device(batch, device)
    assert moved["ids"].device.type == moved["mask"].device.type == device.type
    assert waits.count == 0


# ---- pinned memory of ptacc's loaders


@dataclass
class Numbers:
    values: Tensor
    names: list[str]


def collate_numbers(samples: list[int]) -> Numbers:
    return Numbers(torch.tensor(samples, dtype=torch.float32)[:, None], [str(sample) for sample in samples])


class Listed(Dataset[int]):
    def __len__(self) -> int:
        return 8

    @override
    def __getitem__(self, index: int) -> int:
        return range(8)[index]


class Streamed(IterableDataset[int]):
    @override
    def __iter__(self) -> Iterator[int]:
        return iter(range(8))


class RecordsPinning(TrainingLoop[Numbers, Tensor]):
    """Records for each batch on the host whether its memory is pinned."""

    pinned: list[bool] = field(init=False, default_factory=list)

    @override
    def count_items(self, batch: Numbers) -> int:
        self.pinned.append(batch.values.is_pinned())
        return len(batch.names)

    @override
    def train_step(self, batch: Numbers) -> StepOutput[Tensor]:
        outputs = self.model(batch.values)
        return StepOutput(loss=outputs.square().mean(), outputs=outputs)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [Listed(), Streamed()])
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_loaders_pin_batches_of_any_type(device: torch.device, dataset: Any, workers: int) -> None:
    net = nn.Linear(1, 1)
    trainer = RecordsPinning(net, optimizer=SGD(net.parameters(), lr=1e-3), default_callbacks=())
    trainer.train(
        dataset,
        max_steps=2,
        collate_fn=collate_numbers,
        per_device_batch_size=4,
        train_dataloader_kwargs={"num_workers": workers},
    )
    assert trainer.device.type == device.type
    assert trainer.pinned == [True, True]
