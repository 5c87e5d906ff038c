"""The items of batches that are not tensors of samples: the default count is right, or an error."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence
from typing_extensions import override

from ptacc import StepOutput, TrainingLoop
from ptacc.errors import DataError


class Sequences(TrainingLoop[Any, Any, Tensor]):
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

    assert [step.items for step in make_loop().train(sequences(), collate_fn=collate, num_epochs=1).steps] == [6, 6]
