"""`Seq2SeqTrainer`: generated sequences in evaluations and predictions."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import WordErrorRate
from typing_extensions import override

from ptacc import GradAccumMixin
from ptacc.errors import OptionError
from ptacc.protocols import MetricLike
from ptacc.trainers import Seq2SeqTrainer
from tests.ranks import run_ranks
from tests.trainers.hf_models import Sample, collate, make_optimizer, make_t5, make_tagger, make_translation_data

GENERATION = {"max_new_tokens": 6, "do_sample": False}


class Kept(MetricLike):
    """Keeps what it was given."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Any, Any]] = []

    @override
    def update(self, written: list[Any], wanted: list[Any]) -> None:
        self.pairs += zip(written, wanted, strict=True)

    @override
    def compute(self) -> float:
        return float(len(self.pairs))

    @override
    def reset(self) -> None:
        self.pairs = []


def make_trainer(**options: Any) -> Seq2SeqTrainer:
    model = make_t5()
    return Seq2SeqTrainer(model, optimizer=make_optimizer(model), default_callbacks=(), **options)


def spell(rows: list[list[int]]) -> list[str]:
    return [" ".join(map(str, row)) for row in rows]


def spell_tensors(rows: list[Tensor]) -> list[str]:
    return spell([row.tolist() for row in rows])


def copied_data(count: int = 8) -> list[Sample]:
    """Return samples whose labels are one token and the end."""
    return [{"input_ids": torch.tensor([2, 1]), "labels": torch.tensor([5, 1])} for _ in range(count)]


def test_metrics_get_the_written_and_the_wanted_tokens_without_padding() -> None:
    kept, data = Kept(), make_translation_data(10)
    make_trainer(generation=GENERATION, metrics={"kept": kept}).evaluate(data, collate_fn=collate)
    assert [wanted.tolist() for _, wanted in kept.pairs] == [sample["labels"].tolist() for sample in data]
    assert all(0 < len(written) <= 6 and (written != 0).all() for written, _ in kept.pairs)


def test_metrics_get_texts_with_decode() -> None:
    kept, data = Kept(), make_translation_data(3)
    make_trainer(generation=GENERATION, decode=spell, metrics={"kept": kept}).evaluate(data, collate_fn=collate)
    assert [wanted for _, wanted in kept.pairs] == spell_tensors([sample["labels"] for sample in data])


def test_a_model_learns_to_write_what_it_is_shown() -> None:
    trainer = make_trainer(generation=GENERATION, decode=spell, metrics={"errors": WordErrorRate()})
    history = trainer.train(copied_data(), copied_data(), collate_fn=collate, num_epochs=30)
    assert history[-1].metrics["errors"] == 0
    assert [row.tolist() for row in trainer.predict(copied_data(2), collate_fn=collate)] == [[5, 1], [5, 1]]


def test_without_generation_metrics_get_logits_and_labels() -> None:
    trainer = make_trainer(metrics={"accuracy": MulticlassAccuracy(32, average="micro")})
    result = trainer.evaluate(make_translation_data(), collate_fn=collate)
    assert 0 <= result.metrics["accuracy"] < 1


@pytest.mark.parametrize("batch_size", [1, 4])
def test_predictions_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    trainer = make_trainer(generation=GENERATION)
    data = [{"input_ids": sample["input_ids"]} for sample in make_translation_data(6)]
    predictions = trainer.predict(data, collate_fn=pad_inputs, per_device_batch_size=batch_size)
    assert spell_tensors(predictions) == spell_tensors(
        trainer.predict(data, collate_fn=pad_inputs, per_device_batch_size=6)
    )


def pad_inputs(samples: list[Sample]) -> dict[str, Any]:
    batch = collate([{**sample, "labels": sample["input_ids"]} for sample in samples])
    return {name: value for name, value in batch.items() if name != "labels"}


def test_generation_in_a_run_uses_the_cache() -> None:
    class Watching(Seq2SeqTrainer):
        @override
        def generate_tokens(self, batch: Any) -> Tensor:
            self.unwrapped_model.get_submodule("decoder").register_forward_hook(
                lambda _module, _inputs, kwargs, _output: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
            )
            return super().generate_tokens(batch)

    lengths: list[int] = []
    model = make_t5()
    trainer = Watching(model, optimizer=make_optimizer(model), default_callbacks=(), generation=GENERATION)
    trainer.evaluate(make_translation_data(2), collate_fn=collate)
    assert set(lengths) == {1}


def evaluate_on_ranks() -> tuple[float, list[str], float]:
    class Accumulating(GradAccumMixin, Seq2SeqTrainer): ...

    model, kept = make_t5(), Kept()
    trainer = Accumulating(
        model, optimizer=make_optimizer(model), default_callbacks=(), generation=GENERATION, metrics={"kept": kept}
    )
    result = trainer.evaluate(make_translation_data(11), collate_fn=collate, per_device_batch_size=2)
    return (
        result.loss,
        spell_tensors(trainer.predict(make_translation_data(11), collate_fn=collate)),
        result.metrics["kept"],
    )


@pytest.mark.timeout(120)
def test_two_processes_generate_what_one_does() -> None:
    (alone,) = run_ranks(evaluate_on_ranks, 1)
    for loss, predictions, kept in run_ranks(evaluate_on_ranks, 2):
        assert loss == pytest.approx(alone[0], rel=1e-6)
        assert (predictions, kept) == alone[1:]


def test_a_model_that_cannot_generate_is_an_error() -> None:
    model = make_tagger()
    with pytest.raises(OptionError, match="must have a method `generate`"):
        Seq2SeqTrainer(model, optimizer=make_optimizer(model))
