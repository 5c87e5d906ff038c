"""Step losses equal those of `transformers.Trainer`, where it divides by the number of labels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from transformers import PreTrainedModel

from ptacc import GradAccumMixin
from ptacc.trainers import CausalLMTrainer, Seq2SeqTrainer, SequenceClassificationTrainer
from tests.ranks import run_ranks
from tests.trainers import hf_models
from tests.trainers.hf_reference import EPOCHS, ExactTrainer, ReferenceTrainer, reference_losses

pytestmark = [pytest.mark.prove, pytest.mark.timeout(300)]


class LanguageTrainer(GradAccumMixin, CausalLMTrainer): ...


class TranslationTrainer(GradAccumMixin, Seq2SeqTrainer): ...


class ClassTrainer(GradAccumMixin, SequenceClassificationTrainer): ...


AnyTrainer = LanguageTrainer | TranslationTrainer | ClassTrainer


@dataclass(frozen=True)
class Case:
    make_model: Callable[[], PreTrainedModel]
    make_data: Callable[[int], list[hf_models.Sample]]
    trainer_class: type[AnyTrainer]
    reference: type[ReferenceTrainer] = ExactTrainer
    shifts_labels: bool = False


CASES = {
    # As it is: its loss function takes the number of labels of a step.
    "llama": Case(hf_models.make_llama, hf_models.make_language_data, LanguageTrainer, ReferenceTrainer, True),
    "gpt2": Case(hf_models.make_gpt2, hf_models.make_language_data, LanguageTrainer, shifts_labels=True),
    "t5": Case(hf_models.make_t5, hf_models.make_translation_data, TranslationTrainer),
    "bert": Case(hf_models.make_classifier, hf_models.make_class_data, ClassTrainer),
}


def own_losses(case: Case, count: int, accumulate: int) -> list[float]:
    model = case.make_model()
    trainer: Any = case.trainer_class(
        model,
        optimizer=hf_models.make_optimizer(model),
        gradient_accumulation_steps=accumulate,
        default_callbacks=(),
    )
    history = trainer.train(
        case.make_data(count),
        collate_fn=hf_models.collate,
        num_epochs=EPOCHS,
        per_device_batch_size=4,
        train_dataloader_kwargs={"shuffle": False},
    )
    return [step.loss for step in history.steps]


def their_losses(case: Case, count: int, accumulate: int) -> list[float]:
    return reference_losses(
        case.make_model(),
        case.make_data(count),
        hf_models.collate,
        case.reference,
        accumulate=accumulate,
        shifts_labels=case.shifts_labels,
    )


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_each_step_is_that_of_transformers(name: str, processes: int, accumulate: int) -> None:
    # With 2 processes, transformers repeats samples in an incomplete last batch.
    count = 30 if processes == 1 else 32
    own = run_ranks(own_losses, processes, CASES[name], count, accumulate)
    (theirs, *_) = run_ranks(their_losses, processes, CASES[name], count, accumulate)
    for losses in own:
        assert losses == pytest.approx(theirs, rel=0, abs=1e-6)
