"""Each guard refuses its mistake, and accepts the form that its message suggests."""

import contextlib
import dataclasses
import functools
import types
import typing
import typing as t
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pytest
import torch
import typing_extensions
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from typing_extensions import override

from ptacc import (
    AMPMixin,
    BatchMixin,
    Callback,
    DataLoaderConfig,
    EpochRecord,
    GradAccumMixin,
    GradClipMixin,
    LRSchedulerMixin,
    MetricsMixin,
    Mixin,
    Pair,
    RunPlan,
    StepOutput,
    StepResult,
    Trainer,
    TrainerCore,
    TrainingLoop,
    hook,
    replaces_super,
)
from ptacc.composition.guards import calls_super
from ptacc.composition.misnamed import EVENTS_ELSEWHERE, METHODS_ELSEWHERE
from ptacc.composition.roles import is_mixin
from ptacc.errors import CompositionError
from ptacc.protocols import MetricLike, SchedulerFactory, SupportsMetrics, SupportsMixedPrecision
from ptacc.testing import tiny_data, tiny_parts


def refused(message: str) -> contextlib.AbstractContextManager[object]:
    return pytest.raises(CompositionError, match=message)


def option_names(cls: type) -> set[str]:
    return {option.name for option in dataclasses.fields(cls) if option.init}


def every_fifth(optimizer: Optimizer, plan: RunPlan) -> LRScheduler:
    return StepLR(optimizer, step_size=5)


def log_step(self: Any, step: StepResult) -> None:
    return None


# ---- a name in two classes


class Freezes(Mixin):
    def freeze(self) -> None: ...


class FreezesToo(Mixin):
    def freeze(self) -> None: ...


class Temperature(Mixin):
    temperature: float = 1.0


class TemperatureToo(Mixin):
    temperature: float = 2.0


def test_a_method_of_two_unrelated_mixins_is_refused() -> None:
    with refused("freeze is declared by Freezes and by FreezesToo, which are unrelated"):

        class Both(Freezes, FreezesToo, Trainer): ...


def test_a_method_of_a_mixin_and_of_a_users_trainer_is_refused() -> None:
    class Mine(Trainer):
        def freeze(self) -> None: ...

    with refused("freeze is declared by Freezes and by Mine"):

        class Both(Freezes, Mine): ...


def test_an_option_of_two_unrelated_mixins_is_refused_with_equal_types() -> None:
    with refused("temperature is declared by Temperature and by TemperatureToo"):

        class Both(Temperature, TemperatureToo, Trainer): ...


def test_an_option_of_two_unrelated_mixins_is_refused_with_different_types() -> None:
    class Cold(Mixin):
        temperature: str = "cold"

    with refused("temperature is declared by Temperature and by Cold"):

        class Both(Temperature, Cold, Trainer): ...  # type: ignore[misc]


def test_a_name_that_a_common_base_declares_is_accepted() -> None:
    class Tempered(Mixin):
        temperature: float = 1.0

    class Warm(Tempered):
        temperature = 2.0

    class Hot(Tempered):
        temperature = 3.0

    class Both(Warm, Hot, Trainer): ...

    assert "temperature" in option_names(Both)


def test_a_diamond_of_mixins_is_accepted() -> None:
    class Accumulates(GradAccumMixin): ...

    class Clips(GradClipMixin, GradAccumMixin): ...

    class Both(Accumulates, Clips, Trainer): ...

    assert {"max_grad_norm", "gradient_accumulation_steps"} <= option_names(Both)


def test_a_method_that_a_users_trainer_overrides_is_accepted() -> None:
    class Mine(Freezes, Trainer):
        @override
        def freeze(self) -> None: ...

    class MineAgain(AMPMixin, Mine): ...

    assert Mine in MineAgain.__mro__


def test_a_protocol_of_ptacc_among_the_bases_is_refused() -> None:
    with refused("Leave SupportsMixedPrecision out of the bases"):

        class Mine(AMPMixin, Trainer, SupportsMixedPrecision): ...

    with refused("Leave SupportsMetrics out of the bases"):

        class Measured(MetricsMixin, Trainer, SupportsMetrics): ...  # pyright: ignore[reportIncompatibleVariableOverride]


def test_a_users_protocols_among_the_bases_are_accepted() -> None:
    class CanWalk(Protocol):
        def walk(self) -> None: ...

    class CanTalk(Protocol):
        def talk(self) -> None: ...

    class Walks(Mixin, CanWalk):
        @override
        def walk(self) -> None: ...

    class Talks(Mixin, CanTalk):
        @override
        def talk(self) -> None: ...

    class Both(Walks, Talks, Trainer): ...

    assert Both.__name__ == "Both"


def test_private_names_conflict_like_public_ones() -> None:
    class Left(Mixin):
        def _helper(self) -> None: ...

    class Right(Mixin):
        def _helper(self) -> None: ...

    with refused("_helper is declared by Left and by Right"):

        class Both(Left, Right, Trainer): ...


# ---- a member with the name of an option


def test_a_method_with_the_name_of_an_option_is_refused() -> None:
    with refused("loss_func is an option, and this method would hide it"):

        class Mine(Trainer):
            @override  # type: ignore[misc]
            def loss_func(self, outputs: Tensor, targets: Tensor) -> Tensor:
                return (outputs - targets).abs().mean()


def test_a_property_with_the_name_of_an_option_is_refused() -> None:
    with refused("gradient_accumulation_steps is an option, and this property would hide it"):

        class Mine(GradAccumMixin, Trainer):
            @property  # type: ignore[misc]
            @override
            def gradient_accumulation_steps(self) -> int:  # type: ignore[override]
                return 4


def test_a_cached_property_with_the_name_of_an_option_is_refused() -> None:
    with refused("history_file is an option, and this property would hide it"):

        class Mine(Trainer):
            @functools.cached_property  # type: ignore[misc]
            @override
            def history_file(self) -> str | Path | None:  # type: ignore[override]
                return "history.jsonl"


def test_an_option_with_the_name_of_a_method_or_property_is_refused() -> None:
    with refused("progress: a base has a method or property of this name"):

        class Mine(Trainer):
            progress: float = 0.0  # type: ignore[assignment]

    with refused("on_step_end: a base has a method or property of this name"):

        class Listens(Trainer):
            on_step_end: Callable[[StepResult], None] = print  # type: ignore[assignment]


def test_members_with_new_names_are_accepted() -> None:
    class Mine(Trainer):
        class Config:
            depth = 3

        Color = Enum("Color", ["RED", "BLUE"])

        @property
        def error_rate(self) -> float:
            return 0.0

        @functools.cached_property
        def on_gpu(self) -> bool:
            return False

        @staticmethod
        def half(value: float) -> float:
            return value / 2

    assert option_names(Mine) == option_names(Trainer)


# ---- new values for inherited options


def test_an_unannotated_value_for_an_option_without_default_is_refused() -> None:
    with refused(r"Annotate it: `create_scheduler: SchedulerFactory = every_fifth`"):

        class Mine(LRSchedulerMixin, Trainer):
            create_scheduler = every_fifth

    with refused(r"Annotate it: `loss_func: Callable\[\[Tensor, Tensor\], Tensor\] = mse_loss`"):

        class Squares(Trainer):
            loss_func = nn.functional.mse_loss


def test_an_annotated_function_is_accepted_as_a_default() -> None:
    class Mine(LRSchedulerMixin, Trainer):
        create_scheduler: SchedulerFactory = every_fifth

    class MineAgain(Mine):
        create_scheduler: SchedulerFactory = lambda optimizer, plan: StepLR(optimizer, step_size=1)

    class MineUnannotated(Mine):
        create_scheduler = every_fifth

    assert "create_scheduler" in option_names(MineAgain) & option_names(MineUnannotated)


@pytest.mark.parametrize("default", ["bf16", None, 0, "", False])
def test_a_new_default_without_annotation_is_accepted(default: object) -> None:
    mine = type("Mine", (AMPMixin, Trainer), {"mixed_precision": default})
    (option,) = (option for option in dataclasses.fields(mine) if option.name == "mixed_precision")
    assert option.default is default


def test_a_redeclared_model_is_refused() -> None:
    with refused("redeclaring it makes it keyword-only"):

        class Mine(Trainer):
            model: nn.Linear  # pyright: ignore[reportIncompatibleMethodOverride]  # mypy accepts it


def test_a_property_that_returns_the_models_exact_type_is_accepted() -> None:
    class Mine(Trainer):
        @property
        def linear(self) -> nn.Linear:
            assert isinstance(self.unwrapped_model, nn.Linear)
            return self.unwrapped_model

    assert option_names(Mine) == option_names(Trainer)


# ---- undeclared hooks


@pytest.mark.parametrize(("name", "meant"), [("on_epoch_ended", "on_epoch_end"), ("around_steps", "around_step")])
def test_a_misspelt_hook_is_refused(name: str, meant: str) -> None:
    with refused(rf"{name}: no base declares this hook.*Did you mean `{meant}`\?.*decorate it with `@hook"):
        type("Mine", (Trainer,), {name: log_step})


@pytest.mark.parametrize("make", [staticmethod, classmethod, functools.partial, lambda function: function])
def test_a_misspelt_hook_is_refused_for_every_kind_of_callable(make: Callable[[object], object]) -> None:
    with refused("on_steps_end: no base declares this hook"):
        type("Mine", (Trainer,), {"on_steps_end": make(log_step)})


def test_a_misspelt_event_of_a_callback_is_refused() -> None:
    with refused(r"Noisy.on_epoch_ended: .*Did you mean `on_epoch_end`\?"):

        class Noisy(Callback[TrainerCore]):
            def on_epoch_ended(self, trainer: TrainerCore, record: EpochRecord) -> None: ...


def test_a_hook_of_trainers_in_a_callback_is_refused() -> None:
    with refused("Noisy.on_gradients_ready: no base declares this hook"):

        class Noisy(Callback[TrainerCore]):
            def on_gradients_ready(self, trainer: TrainerCore, step: StepResult) -> None: ...


def test_attributes_of_a_callback_may_have_the_prefix_of_events() -> None:
    @dataclass
    class Noisy(Callback[TrainerCore]):
        on_done: Callable[[], None] = print
        on_gpu: bool = False

        @property
        def on_cpu(self) -> bool:
            return not self.on_gpu

    assert Noisy().on_cpu


def test_a_declared_hook_can_be_overridden() -> None:
    class Declares(Mixin):
        @hook("event")
        def on_tea_break(self) -> None: ...

    class WithSuper(Declares):
        @override
        def on_tea_break(self) -> None:
            super().on_tea_break()

    with refused(r"Add `super\(\).on_tea_break\(\)`"):

        class WithoutSuper(Declares):
            @override
            def on_tea_break(self) -> None: ...


def is_accepted(base: type, name: str) -> bool:
    try:
        type("Mine", (base,), {name: log_step})
    except CompositionError:
        return False
    return True


NEAR_MISSES = {
    "train_setp": "train_step",
    "trainStep": "train_step",
    "evalstep": "eval_step",
    "count_item": "count_items",
    "should_stopp": "should_stop",
    "make_sead": "make_seed",
    "check_option": "check_options",
}


@pytest.mark.parametrize(("name", "meant"), NEAR_MISSES.items())
def test_a_near_miss_of_a_hook_is_refused_with_the_name_that_is_meant(name: str, meant: str) -> None:
    with refused(rf"Mine.{name}: no base declares this hook.*Did you mean `{meant}`\?.*`@hook"):
        type("Mine", (Trainer,), {name: log_step})


OF_OTHERS = {
    "training_step": "train_step",
    "validation_step": "eval_step",
    "prediction_step": "eval_step",
    "compute_loss": "train_step",
    "calculate_train_batch_loss": "train_step",
    "get_train_dataloader": "make_train_dataloader",
    "val_dataloader": "make_eval_dataloader",
    "configure_optimizers": "optimizer_slots",
    "create_scheduler": "LRSchedulerMixin",
    "optimizer_step": "make_engine",
    "update_metrics": "MetricsMixin",
    "on_train_epoch_end": "on_epoch_end",
    "on_train_begin": "on_run_start",
}


@pytest.mark.parametrize(("name", "here"), OF_OTHERS.items())
def test_a_hook_of_another_trainer_is_refused_with_its_name_here(name: str, here: str) -> None:
    with refused(f"Mine.{name}: no base declares this hook.*{here}"):
        type("Mine", (Trainer,), {name: log_step})


def test_each_hook_of_another_trainer_is_none_of_ptacc_and_has_a_name_here() -> None:
    hooks = {name for cls in TrainingLoop.__mro__ for name in cls.__dict__}
    elsewhere = {**METHODS_ELSEWHERE, **EVENTS_ELSEWHERE}
    assert not hooks & elsewhere.keys()
    assert {here for here in elsewhere.values() if here.isidentifier()} <= hooks


HELPERS = [
    "train_epoch",
    "retrain_step",
    "count_tokens",
    "check_batches",
    "predict_proba",
    "compute_accuracy",
    "_train_stp",
]


@pytest.mark.parametrize("name", HELPERS)
def test_a_helper_with_a_name_of_its_own_is_accepted(name: str) -> None:
    assert is_accepted(Trainer, name)
    assert is_accepted(Callback, name)


def test_a_helper_may_resemble_a_hook_that_its_class_defines_too() -> None:
    class Mine(Trainer):
        @override
        def train_step(self, batch: Pair) -> StepOutput[Tensor]:
            return self.training_step(batch)

        def training_step(self, batch: Pair) -> StepOutput[Tensor]:
            return super().train_step(batch)

    class Derived(Mine):
        @override
        def training_step(self, batch: Pair) -> StepOutput[Tensor]:
            return super().training_step(batch)

    assert Derived.__name__ == "Derived"


def test_a_name_that_is_meant_is_declared_with_hook() -> None:
    class Mine(Trainer):
        @hook("default")
        def configure_optimizers(self) -> None: ...

    class Watches(Callback[object]):
        @hook("default")
        def monitor(self) -> None: ...

    assert {Mine.__name__, Watches.__name__} == {"Mine", "Watches"}


@pytest.mark.parametrize(("name", "meant"), [("monitor", "monitors"), ("state_dcit", "state_dict")])
def test_a_near_miss_of_a_callbacks_method_is_refused(name: str, meant: str) -> None:
    with refused(f"Mine.{name}: no base declares this hook.*Did you mean `{meant}`"):
        type("Mine", (Callback,), {name: log_step})


def test_a_callback_that_would_stop_the_run_by_a_hook_of_trainers_is_refused() -> None:
    with refused(r"Here it is a call of `trainer.stop\(reason\)`"):
        type("Mine", (Callback,), {"should_stop": log_step})


def test_an_override_of_a_final_method_is_refused() -> None:
    with refused(r"Mine.evaluate: evaluate\(\) is final"):
        type("Mine", (Trainer,), {"evaluate": log_step})


@pytest.mark.parametrize(
    "body", [{"max_grad_nrom": 1.0}, {"max_grad_nrom": 1.0, "__annotations__": {"max_grad_nrom": float}}]
)
def test_a_near_miss_of_an_option_is_refused(body: dict[str, object]) -> None:
    with refused("Mine.max_grad_nrom: no base has an option of this name. Did you mean `max_grad_norm`"):
        type("Mine", (GradClipMixin, Trainer), body)


def test_an_option_with_a_name_of_its_own_is_accepted() -> None:
    class Mine(Trainer):
        optimizers: Sequence[Optimizer] = ()
        model_b: nn.Module | None = None
        mode: str = "fast"  # a short word, such as `model`

        class Model(nn.Module): ...

    assert {"optimizers", "model_b", "mode"} <= option_names(Mine)


def test_an_option_may_have_the_prefix_of_hooks() -> None:
    class Mine(Mixin):
        on_done: Callable[[], None] = print

    assert "on_done" in option_names(Mine)


# ---- constructors


def test_an_init_is_refused() -> None:
    with refused(
        r"Mine.__init__: the constructor is generated from the options.*`check_options\(self\)`.*`on_run_start\(self\)`"
    ):

        class Mine(Trainer):
            def __init__(self) -> None: ...


def test_a_post_init_is_refused() -> None:
    with refused("Mine.__post_init__: the constructor is generated from the options"):

        class Mine(Trainer):
            @override
            def __post_init__(self) -> None: ...


def test_options_and_their_checks_are_accepted() -> None:
    class Mine(Trainer):
        smoothing: float = 0.0

        @override
        def check_options(self) -> None: ...

        @override
        def on_run_start(self) -> None:
            super().on_run_start()

    assert "smoothing" in option_names(Mine)


def test_a_base_whose_init_would_never_run_is_refused() -> None:
    class Logs:
        def __init__(self) -> None:
            self.lines: list[str] = []

    with refused("Logs.__init__ would never run"):

        class Mine(Logs, Trainer): ...


def test_an_unrelated_base_without_an_init_is_accepted() -> None:
    class Logs:
        def note(self) -> None: ...

    @dataclass(kw_only=True)
    class Names:
        name: str = "mine"

    class Mine(Logs, Names, Trainer): ...

    assert "name" in option_names(Mine)


def test_an_init_subclass_without_super_is_refused() -> None:
    with refused(r"Registers.__init_subclass__: never calls super\(\)"):

        class Registers(Mixin):
            @override
            def __init_subclass__(cls, **keywords: object) -> None: ...


def test_an_init_subclass_that_calls_super_is_accepted() -> None:
    class Registers(Mixin):
        names: ClassVar[list[str]] = []

        @override
        def __init_subclass__(cls, **keywords: object) -> None:
            super().__init_subclass__(**keywords)
            cls.names.append(cls.__name__)

    class Mine(Registers, Trainer):
        extra: int = 0

    assert (Registers.names, "extra" in option_names(Mine)) == (["Mine"], True)


# ---- annotated names that are not options


def test_a_private_annotated_name_is_refused() -> None:
    with refused(r"would become the keyword '_cache'.*`_cache: ClassVar\[...\]`.*`_cache: ... = field\(init=False\)`"):

        class Mine(Trainer):
            _cache: int = 0


def test_a_private_class_variable_or_field_is_accepted() -> None:
    class Mine(Trainer):
        _shared: ClassVar[list[int]] = []
        _own: int = field(init=False, default=0)
        _made: list[int] = field(init=False, default_factory=list)

    assert option_names(Mine) == option_names(Trainer)


def test_class_variables_are_recognised_in_every_spelling() -> None:
    class Mine(Trainer):
        _plain: ClassVar = 0
        _typing: typing.ClassVar[int] = 0
        _alias: t.ClassVar[list[int]] = []
        _extensions: typing_extensions.ClassVar[int] = 0
        _string: "ClassVar[int]" = 0
        _alias_string: "t.ClassVar[tuple[int, ...]]" = ()
        _tensor_string: "typing.ClassVar[torch.Tensor | None]" = None
        _extensions_string: "typing_extensions.ClassVar[int]" = 0
        unparametrised_string: "ClassVar" = 0

    assert option_names(Mine) == option_names(Trainer)
    assert typing.get_type_hints(Mine)["_alias_string"] == ClassVar[tuple[int, ...]]
    assert typing.get_type_hints(Mine)["_tensor_string"] == ClassVar[torch.Tensor | None]


def test_a_subclass_may_set_an_inherited_class_variable() -> None:
    class Named(Mixin):
        kind: ClassVar[str]

    class Mine(Named, Trainer):
        kind = "mine"

    assert option_names(Mine) == option_names(Trainer)


@pytest.mark.parametrize("annotation", [InitVar, InitVar[int], "InitVar[int]", "dataclasses.InitVar[int]"])
def test_an_init_variable_is_refused(annotation: object) -> None:
    with refused("start: only a `__post_init__` can read an InitVar"):
        type("Mine", (Trainer,), {"__annotations__": {"start": annotation}})


def test_a_type_whose_name_begins_like_init_var_is_accepted() -> None:
    mine = type("Mine", (Trainer,), {"__annotations__": {"start": "InitVariant | None"}, "start": None})
    assert "start" in option_names(mine)


class Count:
    def update(self) -> None: ...

    def compute(self) -> int:
        return 0

    def reset(self) -> None: ...


@pytest.mark.parametrize("shared", [nn.Linear(1, 1), MeanMetric(), Count(), [], {}, field(default=nn.ReLU())])
def test_a_mutable_default_is_refused(shared: object) -> None:
    body = {"__annotations__": {"part": Any}, "part": shared}
    with refused(r"every trainer would share this object. Write `part: ... = field\(default_factory=lambda: "):
        type("Mine", (Trainer,), body)


def test_a_mutable_default_without_annotation_is_refused() -> None:
    with refused(r"metrics = dict\(...\): every trainer would share"):

        class Mine(MetricsMixin, Trainer):
            metrics = {"mean": MeanMetric()}  # type: ignore[mutable-override]  # noqa: RUF012


def test_a_default_factory_is_accepted() -> None:
    class Mine(MetricsMixin, Trainer):
        metrics: Mapping[str, MetricLike] = field(default_factory=lambda: {"mean": MeanMetric()})
        head: nn.Module = field(default_factory=lambda: nn.Linear(1, 1))
        metric_class: type[MeanMetric] = MeanMetric

    assert {"head", "metric_class"} <= option_names(Mine)


# ---- cooperative hooks


def test_an_event_without_super_is_refused() -> None:
    with refused(
        r"Mine.on_step_end: never calls super\(\).*Add `super\(\).on_step_end\(step\)`, "
        "or decorate it with `@replaces_super`"
    ):

        class Mine(Trainer):
            @override
            def on_step_end(self, step: StepResult) -> None: ...


def test_the_message_shows_the_call_for_the_shape_of_the_hook() -> None:
    with refused(r"Add `with super\(\).around_step\(\): yield`"):

        class Around(Trainer):
            @override
            @contextlib.contextmanager
            def around_step(self) -> Generator[None]:
                yield

    with refused(r"Add `return super\(\).should_stop\(\) or ...`"):

        class Stops(Trainer):
            @override
            def should_stop(self) -> str | None:
                return None


def test_decorated_overrides_that_call_super_are_accepted() -> None:
    class Mine(Trainer):
        @override
        @contextlib.contextmanager
        def around_step(self) -> Generator[None]:
            with super().around_step():
                yield

        @override
        @torch.no_grad()
        def on_step_end(self, step: StepResult) -> None:
            super(Mine, self).on_step_end(step)  # noqa: UP008 - the older form is valid, too

        @override
        def on_epoch_start(self) -> None:
            def later() -> None:
                super(Mine, self).on_epoch_start()

            later()

    assert calls_super(Mine.__dict__["on_step_end"], "on_step_end")


def test_a_call_of_another_method_of_super_is_refused() -> None:
    with refused(r"never calls super\(\).on_run_end.*Add `super\(\).on_run_end\(\)`"):

        class Mine(Trainer):
            @override
            def on_run_end(self) -> None:
                super().on_run_start()


def test_an_override_with_replaces_super_is_accepted() -> None:
    class Mine(Trainer):
        @override
        @replaces_super
        def on_step_end(self, step: StepResult) -> None: ...

        @override
        @replaces_super
        @contextlib.contextmanager
        def around_step(self) -> Generator[None]:
            yield

    assert "on_step_end" in Mine.__dict__


class HalvedMixin(Mixin):
    """Refines hooks of the classes behind it."""

    @override
    def backward(self, loss: Tensor) -> None:
        super().backward(loss / 2)

    @override
    def make_train_dataloader(self, request: DataLoaderConfig) -> DataLoader[object]:
        return super().make_train_dataloader(request)


class NoisyMixin(BatchMixin[Pair, Tensor]):
    """Refines the training step of the class behind it."""

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        return super().train_step((batch[0] + 1, batch[1]))


def make_replacement(name: str) -> Any:
    """Return a new method without `super()`."""
    methods: dict[str, Any] = {
        "train_step": lambda self, batch: StepOutput(self.model(batch[0]).mean(), batch[0]),
        "backward": lambda self, loss: self.run.engine.backward(loss),
        "make_train_dataloader": lambda self, request: request.build(shuffle=True),
    }
    return methods[name]


class Composed(NoisyMixin, Trainer): ...


@pytest.mark.parametrize(
    ("bases", "name", "mixin"),
    [
        ((NoisyMixin, TrainingLoop[Pair, Tensor]), "train_step", "NoisyMixin"),
        ((NoisyMixin, Trainer), "train_step", "NoisyMixin"),
        ((Composed,), "train_step", "NoisyMixin"),
        ((HalvedMixin, NoisyMixin, Trainer), "backward", "HalvedMixin"),
        ((HalvedMixin, Trainer), "make_train_dataloader", "HalvedMixin"),
    ],
)
def test_a_trainer_that_replaces_what_its_mixin_refines_is_refused(
    bases: tuple[type, ...], name: str, mixin: str
) -> None:
    def create(method: object) -> type:
        return types.new_class("Mine", bases, exec_body=lambda body: body.update({name: method}))

    with refused(rf"Mine\.{name}: never calls super\(\)\.{name}.*{mixin}.*`class Mine\({mixin}, MyLoop\)`.*@replaces"):
        create(make_replacement(name))
    assert name in vars(create(replaces_super(make_replacement(name))))


def test_a_mixin_before_the_class_that_defines_the_step_is_accepted() -> None:
    class MyLoop(TrainingLoop[Pair, Tensor]):
        @override
        def train_step(self, batch: Pair) -> StepOutput[Tensor]:
            return StepOutput(self.model(batch[0]).mean(), batch[0])

    class Mine(NoisyMixin, MyLoop): ...

    class Refining(Mine):
        @override
        def train_step(self, batch: Pair) -> StepOutput[Tensor]:
            return super().train_step(batch)

    assert Refining.__mro__.index(NoisyMixin) < Refining.__mro__.index(MyLoop)


def test_a_mixin_may_replace_what_its_own_base_refines() -> None:
    class Other(HalvedMixin):
        @override
        def backward(self, loss: Tensor) -> None:
            self.run.engine.backward(loss)

    assert is_mixin(Other)


@pytest.mark.parametrize("name", ["on_batch_end", "on_train_batch_end", "on_eval_batch_end", "on_gradients_ready"])
def test_a_callback_with_a_hook_of_trainers_is_told_so(name: str) -> None:
    with refused(rf"Mine\.{name}: .*Here it is a hook of trainers and mixins only"):
        type("Mine", (Callback,), {name: lambda self, trainer: None})


@pytest.mark.parametrize("value", [log_step, lambda self, step: None])
def test_an_assigned_function_without_super_is_refused(value: object) -> None:
    with refused(r"never calls super\(\).on_step_end"):
        type("Mine", (Trainer,), {"on_step_end": value})


@pytest.mark.parametrize("value", [functools.partial(print), None, staticmethod(log_step), property(bool)])
def test_a_hook_that_is_not_a_method_is_refused(value: object) -> None:
    with refused(rf"on_step_end: a hook must be a method, and this is a {type(value).__name__}"):
        type("Mine", (Trainer,), {"on_step_end": value})


def test_an_assigned_function_that_calls_super_is_accepted() -> None:
    def on_step_end_of_mine(self: Any, step: StepResult) -> None:
        super(Mine, self).on_step_end(step)  # pyright: ignore[reportAttributeAccessIssue]

    class Mine(Trainer):
        on_step_end = on_step_end_of_mine

    assert "on_step_end" in Mine.__dict__


def test_an_async_hook_is_refused() -> None:
    with refused("on_step_end: hooks are called without await"):

        class Mine(Trainer):
            @override
            async def on_step_end(self, step: StepResult) -> None:  # type: ignore[override]
                super().on_step_end(step)


def test_an_around_hook_that_is_not_a_context_manager_is_refused() -> None:
    with refused("around_step: it is a generator function.*Decorate it with `@contextlib.contextmanager`"):

        class Mine(Trainer):
            @override
            def around_step(self) -> Iterator[None]:  # type: ignore[override]
                with super().around_step():
                    yield


def test_an_event_that_is_a_generator_is_refused() -> None:
    with refused("on_run_end: it is a generator function.*Remove the `yield`"):

        class Mine(Trainer):
            @override
            def on_run_end(self) -> Iterator[None]:  # type: ignore[override]
                super().on_run_end()
                yield


def test_a_hook_declared_again_with_another_shape_is_refused() -> None:
    with refused("TrainerCore declares this hook already, as 'event', and an override cannot change its shape"):

        class Mine(Trainer):
            @override
            @hook("default")
            def on_step_end(self, step: StepResult) -> None: ...


def test_a_replaceable_hook_needs_no_super() -> None:
    class Mine(Trainer):
        @override
        def count_items(self, batch: tuple[Tensor, Tensor]) -> int:
            return 1

        @override
        def make_seed(self) -> int:
            return 7

    assert {"count_items", "make_seed"} <= Mine.__dict__.keys()


# ---- the order of bases


class Fast(Mixin):
    @override
    def make_seed(self) -> int:
        return 1


class Slow(Mixin):
    @override
    def make_seed(self) -> int:
        return 2


def test_two_mixins_that_replace_the_same_hook_are_refused() -> None:
    with refused(r"Both: Fast and Slow both define make_seed\(\), and only one of them can take effect"):
        type("Both", (Fast, Slow, Trainer), {})
    with refused("Slow and Fast both define"):
        type("Both", (Slow, type("Between", (Mixin,), {}), Fast, Trainer), {})


def test_overrides_that_refine_or_derive_or_replace_on_purpose_are_accepted() -> None:
    class Refining(Mixin):
        @override
        def make_seed(self) -> int:
            return super().make_seed() + 1

    class Faster(Fast):
        @override
        def make_seed(self) -> int:
            return 3

    class Replacing(Mixin):
        @replaces_super
        @override
        def make_seed(self) -> int:
            return 4

    class Mine(Fast, Trainer):
        @override
        def make_seed(self) -> int:
            return 5

    model = nn.Linear(1, 1)
    for bases, seed in (
        ((Refining, Fast, Trainer), 2),
        ((Faster, Fast, Trainer), 3),
        ((Replacing, Slow, Trainer), 4),
        ((Mine,), 5),
    ):
        made: Any = type("Made", bases, {})
        assert made(model, optimizer=SGD(model.parameters()), loss_func=nn.MSELoss()).make_seed() == seed


class Recording(BatchMixin[Pair, Tensor]):
    """Refines what a loop does, and records the calls."""

    calls: list[str] = field(init=False, default_factory=list)

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        self.calls.append("train_step")
        return super().train_step(batch)

    @override
    def backward(self, loss: Tensor) -> None:
        self.calls.append("backward")
        super().backward(loss)

    @override
    def make_train_dataloader(self, request: DataLoaderConfig) -> DataLoader[object]:
        self.calls.append("make_train_dataloader")
        return super().make_train_dataloader(request)

    @override
    def make_eval_dataloader(self, request: DataLoaderConfig) -> DataLoader[object]:
        self.calls.append("make_eval_dataloader")
        return super().make_eval_dataloader(request)


def test_a_mixin_may_refine_the_step_and_the_loaders() -> None:
    class Mine(Recording, Trainer): ...

    mine = Mine(**tiny_parts())
    mine.train(tiny_data(8), tiny_data(8), num_epochs=1)
    assert mine.calls == ["make_train_dataloader", "make_eval_dataloader", "train_step", "backward"]


def test_two_mixins_that_replace_the_step_are_refused() -> None:
    class Replaced(BatchMixin[Pair, Tensor]):
        @override
        def train_step(self, batch: Pair) -> StepOutput[Tensor]:
            raise NotImplementedError

    class ReplacedToo(BatchMixin[Pair, Tensor]):
        @override
        def train_step(self, batch: Pair) -> StepOutput[Tensor]:
            raise NotImplementedError

    with refused(r"Replaced and ReplacedToo both define train_step\(\), and only one of them can take effect"):
        type("Both", (Recording, Replaced, ReplacedToo, Trainer), {})


def test_a_mixin_after_the_loop_is_refused() -> None:
    with refused(r"AMPMixin comes after Trainer.*`class Mine\(GradClipMixin, AMPMixin, Trainer\)`"):

        class Mine(GradClipMixin, Trainer, AMPMixin): ...  # type: ignore[misc]


def test_a_mixin_derived_from_the_core_is_refused_after_the_loop_too() -> None:
    class Odd(TrainerCore): ...

    with refused(r"Odd comes after Trainer.*`class Mine\(Odd, Trainer\)`"):

        class Mine(Trainer, Odd): ...


def test_a_late_mixin_that_the_mro_moves_forward_is_accepted() -> None:
    class Mine(Trainer): ...

    class MineAgain(Mine, AMPMixin, Trainer): ...  # type: ignore[misc]  # type checkers require the plain order

    assert MineAgain.__mro__.index(AMPMixin) < MineAgain.__mro__.index(TrainingLoop)


def test_a_mixin_of_mixins_is_accepted() -> None:
    class Usual(AMPMixin, GradClipMixin):
        max_grad_norm: float | None = 1.0

    class Mine(Usual, Trainer):
        """Mine."""

    class MineAgain(Mine): ...

    assert {"mixed_precision", "max_grad_norm"} <= option_names(MineAgain)


def test_abstract_and_empty_classes_are_accepted() -> None:
    class Base(Trainer, ABC):
        @abstractmethod
        def describe(self) -> str: ...

    class Mine(Base):
        """Only a docstring."""

        @override
        def describe(self) -> str:
            return "mine"

    assert Base.__abstractmethods__ == {"describe"}
    assert not Mine.__abstractmethods__


def test_a_generic_mixin_is_accepted_without_type_arguments() -> None:
    class Mine(MetricsMixin, Trainer): ...

    class ForAnyBatch(BatchMixin[object, object]):
        sizes: Sequence[int] = ()

    class ForPairs(ForAnyBatch, Trainer): ...  # pyright: ignore[reportGeneralTypeIssues]  # mypy accepts it

    assert "metrics" in option_names(Mine)
    assert "sizes" in option_names(ForPairs)
