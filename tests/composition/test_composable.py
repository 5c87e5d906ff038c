"""Options and their defaults in composed classes, the constructor, copies and reprs."""

# Users write new defaults without annotation: their `--strict` does not include this check.
# mypy: disable-error-code="mutable-override"

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import (
    AMPMixin,
    Callback,
    GradAccumMixin,
    GradClipMixin,
    LRSchedulerMixin,
    Mixin,
    RunPlan,
    StepOutput,
    StopOnNonFinite,
    Trainer,
    TrainingLoop,
)
from ptacc.composition.fields import own_annotations
from ptacc.errors import CompositionError, NoRunError, OptionError
from ptacc.protocols import SchedulerFactory


class Digits(AMPMixin, GradAccumMixin, Trainer):
    smoothing: float = 0.0
    _made: list[int] = field(init=False, default_factory=list)


def make_parts() -> dict[str, Any]:
    model = nn.Linear(2, 1)
    return {"model": model, "optimizer": SGD(model.parameters(), lr=0.1), "loss_func": nn.functional.mse_loss}


def data() -> TensorDataset:
    return TensorDataset(torch.ones(4, 2), torch.ones(4, 1))


def every_fifth(optimizer: Optimizer, plan: RunPlan) -> LRScheduler:
    return StepLR(optimizer, step_size=5)


# ---- which default is used


class Quiet(Mixin):
    callbacks = (StopOnNonFinite(),)


def test_a_mixins_default_is_not_reset_by_an_unrelated_mixin_before_it() -> None:
    class Mine(AMPMixin, Quiet, Trainer): ...

    assert Mine(**make_parts()).callbacks is Quiet.callbacks


def test_the_nearest_default_in_the_mro_wins() -> None:
    class Four(GradAccumMixin):
        gradient_accumulation_steps = 4

    class Late(GradAccumMixin, Trainer): ...

    class Mine(GradClipMixin, Late, Four): ...  # valid: the MRO puts Four before the loop

    assert Mine(**make_parts()).gradient_accumulation_steps == 4
    assert "gradient_accumulation_steps" not in own_annotations(Mine)


def test_an_inherited_default_factory_is_called_for_each_trainer() -> None:
    class Listed(Mixin):
        callbacks: Sequence[Callback[Any]] = field(default_factory=lambda: [StopOnNonFinite()])

    class Mine(AMPMixin, Listed, Trainer): ...

    first, second = Mine(**make_parts()).callbacks, Mine(**make_parts()).callbacks
    assert len(first) == 1
    assert first is not second


def test_a_default_of_a_subclass_is_inherited_by_its_subclasses() -> None:
    class Half(Digits):
        mixed_precision = "bf16"

    class HalfAgain(Half): ...

    assert (Half(**make_parts()).mixed_precision, HalfAgain(**make_parts()).mixed_precision) == ("bf16", "bf16")
    assert Digits(**make_parts()).mixed_precision is None


def test_a_function_as_a_default_is_not_bound_to_the_instance() -> None:
    class Scheduled(LRSchedulerMixin, Trainer):
        create_scheduler: SchedulerFactory = every_fifth
        activation: Callable[[float], float] = lambda value: value * 2

    trainer = Scheduled(**make_parts())
    assert trainer.create_scheduler is every_fifth
    assert trainer.activation(2.0) == 4.0


def test_an_inherited_annotation_is_resolved_in_its_module() -> None:
    class Half(AMPMixin, Trainer):
        mixed_precision = "bf16"

    assert get_type_hints(Half)["mixed_precision"] == get_type_hints(AMPMixin)["mixed_precision"]


# ---- the constructor


class Later(LRSchedulerMixin, Trainer):
    """An option whose type is defined after it, and names that only the modules of the mixins import."""

    scale: Scale | None = None
    scheduler_interval = "epoch"


class EvenLater(Later): ...


@dataclass
class Scale:
    factor: float = 1.0


@pytest.mark.parametrize("trainer", [Trainer, Digits])
def test_the_annotations_of_a_constructor_are_evaluated_each_in_its_module(trainer: type[Trainer]) -> None:
    hints = get_type_hints(trainer.__init__)
    assert hints["model"] is nn.Module
    assert hints["loss_func"] == Callable[[Tensor, Tensor], Tensor]
    parameters = inspect.signature(trainer, eval_str=True).parameters
    assert {name: p.annotation for name, p in parameters.items()} == {k: v for k, v in hints.items() if k != "return"}


@pytest.mark.parametrize("trainer", [Later, EvenLater])
def test_a_type_that_is_defined_after_the_class_is_found_later(trainer: type[Trainer]) -> None:
    hints = get_type_hints(trainer.__init__)
    assert hints["scale"] == Scale | None
    assert hints["scheduler_interval"] == Literal["step", "epoch"]
    assert hints["create_scheduler"] == SchedulerFactory


def test_an_annotation_with_an_unknown_name_does_not_prevent_the_class() -> None:
    class Unknown(Trainer):
        option: NotDefined | None = None  # type: ignore[name-defined]  # noqa: F821

    assert inspect.signature(Unknown).parameters["model"].annotation is nn.Module
    with pytest.raises(NameError, match="NotDefined"):
        get_type_hints(Unknown.__init__)


def test_the_model_alone_may_be_positional() -> None:
    model, optimizer, loss_func = make_parts().values()
    assert Digits(model, optimizer=optimizer, loss_func=loss_func).model is model
    with pytest.raises(TypeError, match="positional"):
        Digits(model, optimizer, loss_func=loss_func)  # type: ignore[call-arg]


def test_a_misspelt_option_is_refused_with_a_suggestion() -> None:
    with pytest.raises(TypeError, match=r"Digits has no keyword 'smoothin'\. Did you mean `smoothing`\?"):
        Digits(**make_parts(), smoothin=0.1)  # type: ignore[call-arg]


def test_an_option_of_a_mixin_that_is_not_composed_names_the_mixin() -> None:
    with pytest.raises(TypeError, match="max_grad_norm is an option of GradClipMixin: compose it"):
        Digits(**make_parts(), max_grad_norm=1.0)  # type: ignore[call-arg]


def test_a_missing_option_is_named() -> None:
    with pytest.raises(TypeError, match="'optimizer'"):
        Digits(nn.Linear(2, 1), loss_func=nn.functional.mse_loss)  # type: ignore[call-arg]


def test_a_loop_without_train_step_cannot_be_instantiated() -> None:
    class NoStep(TrainingLoop[Tensor, Tensor]): ...

    model = nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r"abstract.*train_step"):
        NoStep(model, optimizer=SGD(model.parameters(), lr=0.1))  # type: ignore[abstract]


def test_the_checks_of_every_class_run_without_super() -> None:
    class Strict(Digits):
        @override
        def check_options(self) -> None:
            raise OptionError("mine")

    with pytest.raises(OptionError, match="gradient_accumulation_steps=0"):
        Strict(**make_parts(), gradient_accumulation_steps=0)
    with pytest.raises(OptionError, match="mine"):
        Strict(**make_parts())


def test_the_options_that_were_given_are_recorded() -> None:
    model, optimizer, loss_func = make_parts().values()
    trainer = Digits(model, optimizer=optimizer, loss_func=loss_func, smoothing=0.1)
    assert trainer.given_options() == {"model", "optimizer", "loss_func", "smoothing"}


def test_a_dataclass_decorator_is_refused() -> None:
    @dataclass
    class Mine(Trainer): ...

    with pytest.raises(CompositionError, match="Leave out @dataclass"):
        Mine(**make_parts())


def test_a_user_defined_eq_is_refused() -> None:
    class Mine(Trainer):  # noqa: PLW1641 - the mistake under test
        @override
        def __eq__(self, other: object) -> bool:
            return True

    with pytest.raises(CompositionError, match="or your own __eq__"):
        Mine(**make_parts())


# ---- text and copies


def test_a_repr_shows_what_was_given_in_one_line() -> None:
    shown = repr(Digits(**make_parts(), mixed_precision="no"))
    assert shown == "Digits(model=Linear(...), optimizer=SGD(...), loss_func=mse_loss, mixed_precision='no')"


def test_a_repr_never_fails() -> None:
    assert repr(Digits.__new__(Digits)) == "Digits()"


def test_a_copy_has_the_options_but_not_the_run() -> None:
    trainer = Digits(**make_parts(), smoothing=0.1, default_callbacks=())
    trainer.train(data(), num_epochs=1)
    twin = copy.copy(trainer)
    assert (twin.model, twin.smoothing, twin.given_options()) == (trainer.model, 0.1, trainer.given_options())
    assert twin._made is not trainer._made  # noqa: SLF001
    with pytest.raises(NoRunError):
        _ = twin.run


def test_a_deep_copy_trains_its_own_model() -> None:
    trainer = Digits(**make_parts(), default_callbacks=())
    trainer.train(data(), num_epochs=1)
    before = copy.deepcopy(trainer.model.state_dict())
    twin = copy.deepcopy(trainer)
    twin.train(data(), num_epochs=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    assert not torch.equal(before["weight"], twin.model.state_dict()["weight"])


def test_a_trainer_can_be_pickled_after_a_run() -> None:
    trainer = Digits(**make_parts(), smoothing=0.1)
    trainer.train(data(), num_epochs=1)
    twin: Digits = pickle.loads(pickle.dumps(trainer))
    assert twin.smoothing == 0.1
    twin.train(data(), num_epochs=1)


class Half(TrainingLoop[Tensor, Tensor]):
    @override
    def train_step(self, batch: Tensor) -> StepOutput[Tensor]:
        raise NotImplementedError


def test_annotations_may_refer_to_classes_defined_later() -> None:
    class Later(Half):
        later: "Defined | None" = None  # noqa: UP037

    class Defined: ...

    model = nn.Linear(2, 1)
    assert Later(model, optimizer=SGD(model.parameters(), lr=0.1)).later is None
