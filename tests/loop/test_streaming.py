"""`stream_predictions`: the caller's code between two predictions, and iterators that are given up."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from ptacc import EvalResult, Pair, Trainer
from ptacc.errors import NestedRunError
from ptacc.testing import tiny_data, tiny_parts

BATCH = 4


class Drawing(Trainer):
    """Draws a number for each batch that it predicts."""

    @override
    def predict_step(self, batch: Any) -> Tensor:
        assert not torch.is_grad_enabled()
        return super().predict_step(batch) + torch.rand(())


def draw() -> tuple[float, float, float]:
    return random.random(), np.random.random_sample(), torch.rand(()).item()  # noqa: NPY002


def seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


def stream(trainer: Trainer) -> Iterator[Tensor]:
    return trainer.stream_predictions(tiny_data(16), per_device_batch_size=BATCH)


def test_the_code_between_predictions_has_its_own_random_numbers() -> None:
    trainer = Drawing(**tiny_parts())
    seed()
    expected = [draw() for _ in range(16)]
    seed()
    assert [draw() for _ in stream(trainer)] == expected


def test_the_random_numbers_of_predictions_do_not_depend_on_that_code() -> None:
    trainer = Drawing(**tiny_parts())
    seed()
    expected = trainer.predict(tiny_data(16), per_device_batch_size=BATCH)
    seed()
    streamed = [(prediction, draw())[0] for prediction in stream(trainer)]
    assert torch.equal(torch.stack(streamed), torch.stack(expected))


def test_the_code_between_predictions_has_gradients() -> None:
    trainer, other = Drawing(**tiny_parts()), nn.Linear(1, 1)
    for _ in stream(trainer):
        other(torch.ones(1, 1)).sum().backward()
    assert torch.equal(torch.as_tensor(other.bias.grad), torch.tensor([16.0]))


def test_two_streams_side_by_side_leave_gradients_and_modes_as_they_were() -> None:
    first, second = Drawing(**tiny_parts()), Drawing(**tiny_parts())
    assert len(list(zip(stream(first), stream(second), strict=True))) == 16
    assert torch.is_grad_enabled()
    assert first.model.training
    assert second.model.training


@pytest.mark.parametrize("read", [1, BATCH, BATCH + 1])
def test_an_iterator_that_is_given_up_leaves_everything_as_it_was(read: int) -> None:
    trainer = Drawing(**tiny_parts())
    predictions = stream(trainer)
    for _ in range(read):
        next(predictions)
    seed()
    expected = [draw(), draw()]
    seed()
    first = draw()
    del predictions
    assert [first, draw()] == expected
    assert torch.is_grad_enabled()
    assert trainer.model.training
    assert trainer.train(tiny_data(16), num_epochs=1)[-1].epoch == 1


def test_a_second_stream_of_a_trainer_is_refused_while_one_is_open() -> None:
    trainer = Drawing(**tiny_parts())
    predictions = stream(trainer)
    next(predictions)
    with pytest.raises(NestedRunError, match=r"Drawing.stream_predictions\(\) was called while it streams other"):
        next(stream(trainer))
    assert len(list(predictions)) == 15
    assert len(list(stream(trainer))) == 16


def test_a_trainer_evaluates_and_predicts_while_its_predictions_are_streamed() -> None:
    trainer = Trainer(**tiny_parts())
    loss, expected = trainer.evaluate(tiny_data(16)).loss, trainer.predict(tiny_data(16))
    predictions = stream(trainer)
    streamed = [next(predictions)]
    assert trainer.evaluate(tiny_data(16)).loss == loss
    assert torch.equal(torch.stack(trainer.predict(tiny_data(16))), torch.stack(expected))
    torch.testing.assert_close(torch.stack([*streamed, *predictions]), torch.stack(expected))
    assert trainer.model.training


class Nested(Trainer):
    """Predicts at the end of an evaluation."""

    predicted: int = 0

    @override
    def on_evaluation_end(self, name: str, result: EvalResult) -> None:
        super().on_evaluation_end(name, result)
        self.predicted = len(self.predict(tiny_data(8)))

    @override
    def eval_step(self, batch: Pair) -> Any:
        assert not self.model.training
        return super().eval_step(batch)


def test_a_hook_of_an_evaluation_predicts() -> None:
    trainer = Nested(**tiny_parts())
    assert trainer.evaluate(tiny_data(16)).loss > 0
    assert trainer.predicted == 8
    assert trainer.model.training
