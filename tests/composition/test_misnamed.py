"""Attributes and options that people know from other trainers: the error names what to write here."""

import copy
import pickle
from typing import Any

import pytest
from torch import nn
from torch.optim import SGD

from ptacc import CheckpointMixin, Mixin, Trainer
from ptacc.composition.misnamed import ATTRIBUTES_ELSEWHERE, OPTIONS_ELSEWHERE
from ptacc.testing import tiny_data, tiny_parts

ATTRIBUTES = {
    "fit": "Here it is `train(train_dataset, eval_dataset, num_epochs=...)`.",
    "validate": "Here it is `evaluate(dataset)`.",
    "run_evaluation": "Here it is `evaluate(dataset)`.",
    "save_model": "Here it is `save_checkpoint(path)` of CheckpointMixin",
    "compute_loss": "Here it is the option `loss_func`",
    "training_step": "Here it is `train_step`.",
    "configure_optimizers": "Here it is the option `optimizer` or the hook `optimizer_slots`.",
    "evalute": "Did you mean `evaluate`?",
    "los_func": "Did you mean `loss_func`?",
    "save_checkpoint": "CheckpointMixin defines it: `class MyTrainer(CheckpointMixin, Trainer): ...`.",
    "metrics": "MetricsMixin defines it",
    "mixed_precision": "AMPMixin defines it",
}
OPTIONS = {
    "epochs": "Here it is `train(..., num_epochs=...)`.",
    "lr": "Here it is an argument of the optimizer, `SGD(model.parameters(), lr=...)`.",
    "batch_size": "Here it is `train(..., per_device_batch_size=...)`.",
    "train_dataset": "Here it is `train(train_dataset, eval_dataset, ...)`.",
    "train_loader": "Here it is `train(train_dataset, eval_dataset, ...)`.",
    "criterion": "Here it is `loss_func=...`.",
    "max_grad_norm": "max_grad_norm is an option of GradClipMixin: compose it.",
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_unknown_attribute_names_what_is_meant(name: str) -> None:
    trainer: Any = Trainer(**tiny_parts())
    with pytest.raises(AttributeError) as caught:
        getattr(trainer, name)
    assert str(caught.value).startswith(f"Trainer has no attribute {name!r}. {ATTRIBUTES[name]}")
    assert not hasattr(trainer, name)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_unknown_option_names_what_is_meant(name: str) -> None:
    options: dict[str, Any] = {**tiny_parts(), name: 3}
    with pytest.raises(TypeError) as caught:
        Trainer(**options)
    assert str(caught.value) == f"Trainer has no keyword {name!r}. {OPTIONS[name]}"


def test_other_names_get_no_suggestion() -> None:
    trainer: Any = Trainer(**tiny_parts())
    with pytest.raises(AttributeError, match=r"^Trainer has no attribute 'frobnicate'\.$"):
        trainer.frobnicate()


def untyped(cls: Any) -> Any:
    return cls


def test_options_are_keywords() -> None:
    model, make = nn.Linear(4, 2), untyped(Trainer)
    with pytest.raises(TypeError) as caught:
        make(model, nn.CrossEntropyLoss(), SGD(model.parameters(), lr=0.1))
    assert str(caught.value) == (
        "Trainer takes 1 positional argument (model), and got 3. The others are keywords: `Trainer(model, "
        "optimizer=..., loss_func=...)`."
    )


def test_train_names_the_option_that_is_meant() -> None:
    trainer: Any = Trainer(**tiny_parts())
    with pytest.raises(TypeError, match=r"^train\(\) has no keyword 'epochs'. Did you mean `num_epochs`\?$"):
        trainer.train(tiny_data(), epochs=3)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("lr", "Here it is an argument of the optimizer, `SGD(model.parameters(), lr=...)`."),
        ("callbacks", "It is an option: Trainer(..., callbacks=...)."),
        ("max_grad_norm", ""),
    ],
)
def test_train_says_where_an_argument_belongs(name: str, advice: str) -> None:
    trainer: Any = Trainer(**tiny_parts())
    with pytest.raises(TypeError) as caught:
        trainer.train(tiny_data(), num_epochs=1, **{name: 1})
    assert str(caught.value) == f"train() has no keyword {name!r}. {advice}".rstrip()


def test_no_name_of_another_trainer_exists_here() -> None:
    trainer = Trainer(**tiny_parts())
    assert [name for name in ATTRIBUTES_ELSEWHERE if hasattr(trainer, name)] == []
    assert trainer.__dataclass_fields__.keys().isdisjoint(OPTIONS_ELSEWHERE)


def test_a_trainer_may_define_these_names() -> None:
    class Fitting(Trainer):
        lr: float = 0.1

        def fit(self) -> float:
            return self.lr

    assert Fitting(**tiny_parts(), lr=0.2).fit() == 0.2


def test_an_attribute_error_within_a_property_is_kept() -> None:
    class Broken(Mixin):
        @property
        def broken(self) -> object:
            unknown: Any = object()
            return unknown.missing

    class Composed(Broken, Trainer): ...

    with pytest.raises(AttributeError, match="'object' object has no attribute 'missing'"):
        _ = Composed(**tiny_parts()).broken


def test_trainers_can_be_copied_and_pickled() -> None:
    class Composed(CheckpointMixin, Trainer): ...

    trainer = Trainer(**tiny_parts())
    assert copy.deepcopy(trainer).loss_func is not trainer.loss_func
    assert isinstance(pickle.loads(pickle.dumps(trainer)), Trainer)
    assert hasattr(Composed, "save_checkpoint")
