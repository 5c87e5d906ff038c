"""Predictions that are not one tensor: one for each sample, the same on any number of processes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from typing_extensions import override

from ptacc import StepOutput, TrainingLoop
from ptacc.errors import DataError
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import run_ranks

Pair = tuple[Tensor, Tensor]


class Scored(NamedTuple):
    score: Tensor
    name: list[str]


class Predicting(TrainingLoop[Pair, Any]):
    make: Callable[[Tensor], Any]

    @override
    def train_step(self, batch: Pair) -> StepOutput[Any]:
        raise NotImplementedError

    @override
    def predict_step(self, batch: Pair) -> Any:
        return self.make(batch[0])


def predict(make: Callable[[Tensor], Any], samples: int = 6, size: int = 3, *, in_loader: bool = False) -> list[Any]:
    parts = tiny_parts()
    del parts["loss_func"]
    data: Any = tiny_data(samples)
    loader = DataLoader(
        data, batch_size=size, collate_fn=lambda batch: tuple(map(torch.stack, zip(*batch, strict=True)))
    )
    trainer = Predicting(**parts, make=make)
    return trainer.predict(loader) if in_loader else trainer.predict(data, per_device_batch_size=size)


def boxes(inputs: Tensor) -> list[dict[str, Tensor]]:
    return [{"boxes": row.repeat(2 + index, 1), "label": row[0]} for index, row in enumerate(inputs)]


@pytest.mark.parametrize("size", [2, 3])
def test_a_list_holds_one_prediction_a_sample_whatever_is_in_it(size: int) -> None:
    inputs = tiny_data(6).tensors[0]
    found = predict(boxes, size=size)
    assert [float(one["label"]) for one in found] == inputs[:, 0].tolist()
    assert [len(one["boxes"]) for one in found] == [2 + index % size for index in range(6)]


def named(inputs: Tensor) -> dict[str, Any]:
    return {"score": inputs[:, 0], "name": [f"{row[0]:.3f}" for row in inputs], "array": np.arange(len(inputs))}


@pytest.mark.parametrize("in_loader", [False, True])
def test_parts_of_a_dictionary_are_split_texts_and_arrays_too(in_loader: bool) -> None:
    found = predict(named, in_loader=in_loader)
    assert [one["name"] for one in found] == [f"{one['score']:.3f}" for one in found]
    assert [int(one["array"]) for one in found] == [0, 1, 2] * 2


def test_predictions_are_the_same_on_two_processes() -> None:
    for make in (boxes, named):
        whole = predict(make, 7, 1)
        for split in run_ranks(predict, 2, make, 7, 1):
            assert repr(split) == repr(whole)


def test_a_tuple_of_tensors_has_parts_and_one_of_anything_else_holds_samples() -> None:
    inputs = tiny_data(5).tensors[0]
    found = predict(lambda x: (x, x[:, 0]), 5)  # the last batch has as many samples as the tuple has parts
    assert [float(part) for _, part in found] == inputs[:, 0].tolist()
    assert len(found[-1][0]) == 4
    assert predict(lambda x: tuple(f"{row[0]:.3f}" for row in x), 5) == [f"{row[0]:.3f}" for row in inputs]


def test_a_tuple_that_can_be_split_in_two_ways_is_refused() -> None:
    with pytest.raises(DataError, match=r"a tuple of 2 for 2 samples.*Return a list for the first, a dictionary"):
        predict(lambda x: (x, x[:, 0]), size=2)


def test_named_tuples_keep_their_class() -> None:
    assert predict(lambda x: Scored(x[:, 0], ["a"] * len(x)))[4].name == "a"


def test_outputs_of_transformers_are_split_without_their_cache() -> None:
    found = predict(lambda x: CausalLMOutputWithPast(logits=x, hidden_states=(x, x + 1)))
    assert isinstance(found[0], CausalLMOutputWithPast)
    assert torch.equal(found[5].hidden_states[1], tiny_data(6).tensors[0][5] + 1)
    with pytest.raises(DataError, match=r"output\['past_key_values'\] is a DynamicCache.*leave out the rest"):
        predict(lambda x: CausalLMOutputWithPast(logits=x, past_key_values=DynamicCache()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x.mean(), r"output is a Tensor of shape \(\), which cannot be split into 3"),
        (lambda x: {"loss": x.mean(), "x": x}, r"output\['loss'\] is a Tensor of shape \(\)"),
        (lambda x: x[:2], r"output is a Tensor of shape \(2, 4\), which cannot be split into 3"),
        (lambda x: [x], "output is a list of length 1"),
        (lambda x: {"x": x, "version": "abc"}, r"output\['version'\] is a str"),
        (lambda x: {}, "output is a dict"),
        (lambda x: None, "output is a NoneType"),
    ],
)
def test_what_is_not_a_prediction_a_sample_is_refused_by_name(make: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"Predicting\.predict_step: {message}"):
        predict(make)


def test_the_samples_of_a_stream_are_counted_too() -> None:
    class Samples(IterableDataset[Any]):
        @override
        def __iter__(self) -> Any:
            data = tiny_data(6)
            return iter([data[index] for index in range(6)])

    parts = tiny_parts()
    del parts["loss_func"]
    with pytest.raises(DataError, match="output is a list of length 1"):
        Predicting(**parts, make=lambda x: [x]).predict(Samples(), per_device_batch_size=3)
