"""Trainers of models of transformers: losses, counts, metrics, predictions, modes and mistakes."""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy, MultilabelAccuracy
from torchmetrics.regression import MeanSquaredError
from transformers import BatchEncoding, DataCollatorWithFlattening
from typing_extensions import override

from ptacc.errors import DataError, ModelError, OptionError
from ptacc.testing import assert_split_invariant
from ptacc.trainers import CausalLMTrainer, HFTrainer, SequenceClassificationTrainer, TokenClassificationTrainer
from tests.trainers.hf_models import (
    Sample,
    collate,
    make_class_data,
    make_classifier,
    make_gpt2,
    make_language_data,
    make_listener,
    make_llama,
    make_optimizer,
    make_segmenter,
    make_tag_data,
    make_tagger,
    make_texts,
)

QUIET: Any = {"default_callbacks": ()}
SHORT: Any = {"collate_fn": collate, "max_steps": 3, "per_device_batch_size": 4}
ORDERED: Any = {"train_dataloader_kwargs": {"shuffle": False}}

PACK: Any = DataCollatorWithFlattening(return_tensors="pt")  # type: ignore[no-untyped-call]


def make_language_trainer(model: Any = None, **options: Any) -> CausalLMTrainer:
    model = make_gpt2() if model is None else model
    return CausalLMTrainer(model, optimizer=make_optimizer(model), **QUIET, **options)


def make_classifying_trainer(**options: Any) -> SequenceClassificationTrainer:
    model = make_classifier(**options)
    return SequenceClassificationTrainer(model, optimizer=make_optimizer(model), **QUIET)


# ---- losses and counts


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
def test_a_language_model_trains_alike_however_a_step_is_split(make: Any) -> None:
    def make_trainer() -> CausalLMTrainer:
        model = make()
        return CausalLMTrainer(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **QUIET)

    assert_split_invariant(make_trainer, make_language_data(36), collate_fn=collate, rel=1e-4)


def test_the_first_label_of_a_sequence_is_not_counted() -> None:
    data = make_language_data(4)
    expected = sum(int((sample["labels"][1:] != -100).sum()) for sample in data)
    assert make_language_trainer().count_items(collate(data)) == expected


def test_labels_shifted_by_a_collator_are_counted_as_they_are() -> None:
    labels = torch.tensor([[4, 5, -100]])
    assert make_language_trainer().count_items({"labels": labels, "shift_labels": labels}) == 2


def test_a_batch_without_labels_to_predict_changes_nothing() -> None:
    data = make_language_data(4)
    silent = [{**sample, "labels": torch.full_like(sample["labels"], -100)} for sample in data]
    trainer, alone = make_language_trainer(), make_language_trainer()
    trainer.accumulation_steps = lambda: 2  # type: ignore[method-assign]
    options: Any = {"collate_fn": collate, "num_epochs": 1, "per_device_batch_size": 4}
    both = trainer.train([*data, *silent], **options, **ORDERED)
    assert both.steps[0].loss == alone.train(data, **options, **ORDERED).steps[0].loss
    assert trainer.model.state_dict().keys() == alone.model.state_dict().keys()
    assert all(map(torch.equal, trainer.model.state_dict().values(), alone.model.state_dict().values()))


def test_perplexity_is_the_exponential_of_the_evaluation_loss() -> None:
    result = make_language_trainer().evaluate(make_language_data(), collate_fn=collate)
    assert result.metrics == {"perplexity": math.exp(result.loss)}


def test_label_smoothing_is_that_of_torch_and_left_out_of_evaluations() -> None:
    data = make_class_data(4)
    trainer = make_classifying_trainer()
    trainer.label_smoothing = 0.2
    batch = collate(data)
    logits = trainer.model(**batch).logits
    expected = cross_entropy(logits, batch["labels"], label_smoothing=0.2)
    assert torch.allclose(trainer.train_step(batch).loss, expected)
    assert torch.equal(trainer.eval_step(batch).loss, cross_entropy(logits, batch["labels"]))


def test_smoothed_losses_of_tokens_are_means_over_the_labels_that_are_used() -> None:
    trainer = make_language_trainer(label_smoothing=0.2)
    batch = collate(make_language_data(4))
    logits, targets = trainer.model(**batch).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    expected = cross_entropy(logits, targets, label_smoothing=0.2)
    assert torch.allclose(trainer.train_step(batch).loss / trainer.count_items(batch), expected)


def test_sequences_packed_into_a_row_have_the_loss_of_padded_ones() -> None:
    texts = make_texts(8)
    padded = [{**sample, "labels": sample["input_ids"]} for sample in texts]
    packed = [{"input_ids": sample["input_ids"].tolist()} for sample in texts]
    trainer = make_language_trainer(make_llama())
    expected = trainer.evaluate(padded, collate_fn=collate).loss
    assert trainer.evaluate(packed, collate_fn=PACK).loss == pytest.approx(expected, rel=1e-5)


def make_trainer_of(make: Callable[[], Any]) -> Callable[[], HFTrainer]:
    def make_trainer() -> HFTrainer:
        model = make()
        return HFTrainer(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **QUIET)

    return make_trainer


def test_pixels_that_the_config_ignores_are_not_counted() -> None:
    images = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    data = [{"pixel_values": image, "labels": (image[0] * 3).long()} for image in images]
    for index, sample in enumerate(data):
        sample["labels"][: 2 * (index % 12)] = 255
    assert_split_invariant(make_trainer_of(make_segmenter), data, rel=1e-4)
    labels = torch.stack([sample["labels"] for sample in data])
    assert make_trainer_of(make_segmenter)().count_items({"labels": labels}) == (labels != 255).sum()


def test_a_class_of_an_image_with_the_number_of_ignored_pixels_counts() -> None:
    assert make_trainer_of(make_segmenter)().count_items({"labels": torch.tensor([255, 3, -100])}) == 2


def test_the_mean_of_ctc_is_over_samples() -> None:
    waves = torch.randn(20, 400, generator=torch.Generator().manual_seed(1))
    data = [{"input_values": wave, "labels": torch.full((6,), -100)} for wave in waves]
    for index, sample in enumerate(data):
        sample["labels"][: 1 + index % 6] = torch.arange(2, 3 + index % 6)
    assert_split_invariant(make_trainer_of(lambda: make_listener(ctc_loss_reduction="mean")), data, rel=1e-4)


def test_a_sum_of_ctc_is_an_error() -> None:
    data = [{"input_values": torch.randn(400), "labels": torch.tensor([2, 3])}]
    with pytest.raises(ModelError, match=r"config.ctc_loss_reduction='sum'.*set `model.config.ctc_loss_reduction = "):
        make_trainer_of(make_listener)().train(data, num_epochs=1)


def test_a_number_of_minus_100_counts() -> None:
    assert make_classifying_trainer(num_labels=1).count_items({"labels": torch.tensor([1.0, -100.0])}) == 2


# ---- predictions and metrics


@pytest.mark.parametrize("batch_size", [1, 4])
def test_predictions_have_no_padding(batch_size: int) -> None:
    data = make_language_data(6)
    predictions = make_language_trainer().predict(data, collate_fn=collate, per_device_batch_size=batch_size)
    assert [len(logits) for logits in predictions] == [len(sample["input_ids"]) for sample in data]


def test_packed_sequences_have_a_prediction_each() -> None:
    texts = [{"input_ids": sample["input_ids"].tolist()} for sample in make_texts(5)]
    predictions = make_language_trainer(make_llama()).predict(texts, collate_fn=PACK)
    assert [len(logits) for logits in predictions] == [len(text["input_ids"]) for text in texts]


def test_metrics_of_tokens_leave_out_padding() -> None:
    model = make_tagger()
    trainer = TokenClassificationTrainer(
        model, optimizer=make_optimizer(model), metrics={"accuracy": MulticlassAccuracy(3, average="micro")}, **QUIET
    )
    data = make_tag_data()
    predictions = trainer.predict(data, collate_fn=collate)
    hits = [
        logits.argmax(-1) == sample["labels"].where(torch.arange(len(logits)) % 4 > 0, -100)
        for logits, sample in zip(predictions, data, strict=True)
    ]
    for sample in data:
        sample["labels"] = sample["labels"].where(torch.arange(len(sample["labels"])) % 4 > 0, -100)
    used = torch.cat([sample["labels"] != -100 for sample in data])
    accuracy = trainer.evaluate(data, collate_fn=collate).metrics["accuracy"]
    assert accuracy == pytest.approx(torch.cat(hits)[used].float().mean().item())


def test_a_classifier_of_several_classes_has_metrics() -> None:
    trainer = make_classifying_trainer(problem_type="multi_label_classification")
    trainer.metrics = {"accuracy": MultilabelAccuracy(3)}
    data = [{**sample, "labels": torch.tensor([1.0, 0.0, 1.0])} for sample in make_texts()]
    assert trainer.train(data, data, collate_fn=stack_labels, num_epochs=8)[-1].metrics["accuracy"] > 0.9


def test_a_regression_has_metrics_of_numbers() -> None:
    trainer = make_classifying_trainer(num_labels=1)
    trainer.metrics = {"mse": MeanSquaredError()}
    data = [{**sample, "labels": sample["input_ids"].float().mean() / 32} for sample in make_texts()]
    result = trainer.evaluate(data, collate_fn=stack_labels)
    assert result.metrics["mse"] == pytest.approx(result.loss, rel=1e-5)


def stack_labels(samples: list[Sample]) -> dict[str, Any]:
    batch = collate([{**sample, "labels": sample["input_ids"]} for sample in samples])
    return {**batch, "labels": torch.stack([sample["labels"] for sample in samples])}


# ---- the model


@pytest.mark.parametrize("batch_class", [dict, BatchEncoding])
def test_batches_are_dictionaries_or_encodings(batch_class: Any) -> None:
    trainer = make_classifying_trainer()
    data = make_class_data()
    options: Any = {"num_epochs": 4, "per_device_batch_size": 8}
    history = trainer.train(data, data, collate_fn=lambda samples: batch_class(collate(samples)), **options)
    assert history[-1].train_loss < history[0].train_loss


def test_the_cache_is_off_during_a_run_and_on_after_it() -> None:
    class Watching(CausalLMTrainer):
        @override
        def train_step(self, batch: Any) -> Any:
            seen.append(model.config.use_cache)
            return super().train_step(batch)

    seen: list[object] = []
    model = make_gpt2()
    Watching(model, optimizer=make_optimizer(model), **QUIET).train(make_language_data(), **SHORT)
    assert seen == [False] * 3
    assert model.config.use_cache is True


def test_a_model_in_eval_mode_as_from_pretrained_returns_it_trains_with_dropout(tmp_path: Any) -> None:
    make_gpt2(resid_pdrop=0.5).save_pretrained(tmp_path)
    model = type(make_gpt2()).from_pretrained(tmp_path)
    assert not model.training
    modes: list[bool] = []
    model.transformer.get_submodule("h.0.mlp.dropout").register_forward_hook(
        lambda module, *_: modes.append(module.training)
    )
    make_language_trainer(model).train(make_language_data(), **SHORT)
    assert modes == [True] * 3


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
def test_gradient_checkpointing_of_transformers_changes_no_loss(make: Any) -> None:
    plain, saving = make(), make()
    enable = getattr(saving, "activation_checkpointing_enable", saving.gradient_checkpointing_enable)  # new in 5.23
    enable()
    runs = [make_language_trainer(model).train(make_language_data(), **SHORT, **ORDERED) for model in (plain, saving)]
    assert [step.loss for step in runs[0].steps] == [step.loss for step in runs[1].steps]


def test_tied_weights_stay_tied() -> None:
    model = make_gpt2()
    make_language_trainer(model).train(make_language_data(), **SHORT)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_transformers_is_imported_where_models_are_made_and_not_before() -> None:
    code = "import sys, ptacc.trainers; sys.exit('transformers' in sys.modules or 'peft' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---- mistakes


def test_samples_without_labels_are_an_error() -> None:
    with pytest.raises(DataError, match='with "labels", and the data gives a dict with the keys input_ids'):
        make_classifying_trainer().train(make_texts(4), num_epochs=1, per_device_batch_size=1)


def test_an_entry_that_the_model_does_not_take_is_an_error() -> None:
    class Model(nn.Module):
        @override
        def forward(self, input_ids: Tensor, labels: Tensor) -> Any: ...

    model = Model()
    model.weight = nn.Parameter(torch.zeros(1))
    trainer = HFTrainer(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **QUIET)
    data = [{"input_ids": torch.zeros(2), "labels": 0, "index": 1}]
    with pytest.raises(DataError, match=r"Model.forward does not take the entry 'index'.*remove_columns"):
        trainer.train(data, num_epochs=1)


def test_a_model_without_a_head_is_an_error() -> None:
    model = make_gpt2().transformer
    trainer = CausalLMTrainer(model, optimizer=make_optimizer(model), **QUIET)
    with pytest.raises(ModelError, match="must return an object with `loss` and `logits`"):
        trainer.train(make_language_data(), **SHORT)


def test_smoothing_of_labels_that_are_floats_is_an_error() -> None:
    trainer = make_classifying_trainer(num_labels=1)
    trainer.label_smoothing = 0.1
    with pytest.raises(DataError, match="must be classes, not floats"):
        trainer.train([{"input_ids": torch.tensor([1, 2]), "labels": 0.5}], num_epochs=1)


def test_smoothing_outside_of_0_to_1_is_an_error() -> None:
    with pytest.raises(OptionError, match=r"label_smoothing=1.5\): must be from 0 to 1"):
        make_language_trainer(label_smoothing=1.5)
