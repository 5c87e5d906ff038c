"""The items of batches that are not tensors of samples: the default count is right, or an error."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel
from typing_extensions import override

from ptacc import GradAccumMixin, StepOutput, TrainingLoop
from ptacc.errors import DataError, LossError


class Sequences(TrainingLoop[Any, Any, nn.Module, Tensor]):
    @override
    def train_step(self, batch: Any) -> StepOutput[Any]:
        parts = unpack_sequence(batch) if isinstance(batch, PackedSequence) else batch[0]
        return StepOutput(loss=torch.stack([self.model(part).mean() for part in parts]).mean(), outputs=None)


def sequences() -> list[Tensor]:
    return [torch.ones(2 + index % 5, 4) for index in range(16)]


def make_loop() -> Sequences:
    model = nn.Linear(4, 1)
    return Sequences(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), default_callbacks=())


def test_items_of_a_packed_sequence_are_its_sequences() -> None:
    history = make_loop().train(
        sequences(), collate_fn=lambda batch: pack_sequence(batch, enforce_sorted=False), num_epochs=1
    )
    assert [step.items for step in history.steps] == [8, 8]


@pytest.mark.parametrize("call", ["train", "evaluate"])
def test_a_count_that_is_not_the_number_of_samples_is_an_error_on_one_process(call: str) -> None:
    def collate(batch: list[Tensor]) -> list[list[Tensor]]:
        return [batch, [torch.ones(3, 2) for _ in batch]]

    options: dict[str, Any] = {"num_epochs": 1} if call == "train" else {}
    with pytest.raises(DataError, match=r"A batch of 8 samples holds [2-6] items"):
        getattr(make_loop(), call)(sequences(), collate_fn=collate, **options)


def test_samples_that_a_collate_function_leaves_out_are_not_counted() -> None:
    def collate(batch: list[Tensor]) -> list[Tensor]:
        return [torch.stack([part[:2] for part in batch if len(part) > 2])]

    assert make_loop().train(sequences(), collate_fn=collate, num_epochs=1)[0].items == 12


class OwnLoss(GradAccumMixin, TrainingLoop[dict[str, Tensor], Any]):
    @override
    def train_step(self, batch: dict[str, Tensor]) -> StepOutput[Any]:
        output = self.model(**batch)
        return StepOutput(loss=output.loss, outputs=output.logits)


class Counted(OwnLoss):
    @override
    def count_items(self, batch: dict[str, Tensor]) -> float:
        return int((batch["labels"][:, 1:] != -100).sum())


def train_gpt(loop: type[OwnLoss], size: int) -> float:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=20, n_positions=12, n_embd=8, n_layer=1, n_head=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = GPT2LMHeadModel(config)
    tokens = torch.randint(0, 20, (8, 12), generator=torch.Generator().manual_seed(1))
    hidden = torch.arange(12) >= torch.tensor([[12], [3], [9], [4], [12], [5], [7], [2]])
    data = [{"input_ids": row, "labels": row.masked_fill(mask, -100)} for row, mask in zip(tokens, hidden, strict=True)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = loop(model, optimizer=optimizer, gradient_accumulation_steps=8 // size, default_callbacks=())
    return trainer.train(data, num_epochs=1, per_device_batch_size=size).steps[0].loss


def test_the_loss_of_gpt2_is_a_mean_over_labels_that_count_items_counts() -> None:
    assert train_gpt(Counted, 4) == pytest.approx(train_gpt(Counted, 8), rel=1e-6)
    with pytest.raises(
        DataError, match=r'`int\(\(batch\["labels"\] != -100\).sum\(\)\)`, with `batch\["labels"\]\[:, 1:\]`'
    ):
        train_gpt(OwnLoss, 4)


class Counting(Sequences):
    """Gives the items of a batch by its first value."""

    @override
    def count_items(self, batch: Any) -> float:
        return float(batch[0, 0])

    @override
    def train_step(self, batch: Any) -> StepOutput[Any]:
        return StepOutput(loss=self.model(batch).mean(), outputs=None)


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ([0.0, 0.0], DataError, "The 2 batches of a step have no items at all"),
        ([1.0, 0.0], LossError, r"A batch has no items, and a mean over nothing is NaN\. Return StepOutput\.from_sum"),
    ],
)
def test_means_over_no_items_are_refused(counts: list[float], error: type[Exception], message: str) -> None:
    class Accumulating(GradAccumMixin, Counting): ...

    model = nn.Linear(4, 1)
    parts: dict[str, Any] = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "default_callbacks": ()}
    batches: DataLoader[Any] = DataLoader([torch.full((4,), count) for count in counts], batch_size=1)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        Accumulating(model, **parts, gradient_accumulation_steps=2).train(batches, num_epochs=1)


class AsGiven(Sequences):
    """Gives a number of items as it was made."""

    make: Any = float

    @override
    def count_items(self, batch: Any) -> float:
        count: float = self.make(3)
        return count

    @override
    def train_step(self, batch: Any) -> StepOutput[Any]:
        return StepOutput(loss=self.model(batch).mean(), outputs=None)


def make_counting(make: Any, **options: Any) -> AsGiven:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return AsGiven(model, optimizer=optimizer, make=make, default_callbacks=(), **options)


@pytest.mark.parametrize("make", [int, float, torch.tensor, np.int64, np.float32])
def test_items_may_be_counted_in_tensors_and_numbers_of_numpy(make: Any, tmp_path: Path) -> None:
    trainer = make_counting(make, history_file=tmp_path / "history.jsonl")
    history = trainer.train(list(torch.ones(16, 4)), list(torch.ones(8, 4)), num_epochs=1)
    kind = int if make is int else float
    assert [(step.items, type(step.items)) for step in history.steps] == [(3, kind)] * 2
    assert type(history[0].evaluations[""].loss) is float


@pytest.mark.parametrize("call", ["train", "evaluate"])
@pytest.mark.parametrize("count", [math.nan, math.inf, -1, None, torch.ones(2)])
def test_a_count_that_is_not_a_number_of_items_is_an_error(count: Any, call: str) -> None:
    options: dict[str, Any] = {"num_epochs": 1} if call == "train" else {}
    with pytest.raises(DataError, match=r"count_items gave .*: it must return a finite number, 0 or more"):
        getattr(make_counting(lambda _: count), call)(list(torch.ones(16, 4)), **options)
