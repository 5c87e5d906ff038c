"""Settings of the accelerator have an effect or are refused, and equal settings never conflict."""

import dataclasses
import gc
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from accelerate.utils import (
    AutocastKwargs,
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProfileKwargs,
)
from typing_extensions import override

from ptacc import AcceleratorBuilder, AMPMixin, DDPMixin, DeepSpeedMixin, FSDPMixin, Mixin, Trainer
from ptacc.distributed.accelerator import release_accelerator
from ptacc.errors import AcceleratorConflictError, CompositionError, LaunchError, OptionError
from ptacc.testing import iris, iris_parts, tiny_data, tiny_parts
from tests.ranks import run_ranks


class Precise(AMPMixin, Trainer): ...


@pytest.fixture(autouse=True)
def _no_accelerator() -> Iterator[None]:
    gc.collect()
    yield
    gc.collect()
    release_accelerator()


def configured(**settings: Any) -> Trainer:
    class Configures(Mixin):
        @override
        def configure_accelerator(self, builder: AcceleratorBuilder) -> None:
            super().configure_accelerator(builder)
            builder.write(Configures, **settings)

    class Configured(Configures, Trainer): ...

    return Configured(**tiny_parts())


# ---- ignored settings

LOADING: dict[str, Any] = {
    "split_batches": True,
    "dispatch_batches": True,
    "even_batches": False,
    "use_seedable_sampler": True,
    "data_seed": 3,
    "non_blocking": True,
    "use_stateful_dataloader": True,
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(DataLoaderConfiguration)])
def test_each_setting_of_accelerates_data_loading_is_refused_by_name(name: str) -> None:
    trainer = configured(dataloader_config=DataLoaderConfiguration(**{name: LOADING[name]}))
    with pytest.raises(OptionError, match=rf"Configures sets the accelerator's {name}, which has no effect here\. \w"):
        trainer.train(tiny_data(), num_epochs=1)


@pytest.mark.parametrize("name", ["fsdp_plugin", "deepspeed_plugin", "parallelism_config", "log_with", "rng_types"])
def test_an_argument_of_accelerate_without_an_effect_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match=f"Configures sets the accelerator's {name}, which has no effect here"):
        configured(**{name: object()}).train(tiny_data(), num_epochs=1)


def test_a_handler_of_accelerate_without_an_effect_is_refused() -> None:
    with pytest.raises(OptionError, match=r"accelerator's ProfileKwargs.*Compose ProfilerMixin"):
        configured(kwargs_handlers=[ProfileKwargs()]).train(tiny_data(), num_epochs=1)


def test_an_unknown_precision_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="Configures sets mixed_precision='fp8': must be one of no, fp16, bf16"):
        configured(mixed_precision="fp8").train(tiny_data(), num_epochs=1)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(OptionError, match="The launch sets mixed_precision='fp8'"):
        Trainer(**tiny_parts()).train(tiny_data(), num_epochs=1)


def test_settings_of_ddp_are_refused_without_its_mixin() -> None:
    handler = DistributedDataParallelKwargs(static_graph=True)
    with pytest.raises(OptionError, match=r"Configured sets DistributedDataParallelKwargs, .* without DDPMixin"):
        configured(kwargs_handlers=[handler]).train(tiny_data(), num_epochs=1)


def test_handlers_of_several_mixins_are_joined() -> None:
    builder, autocast, timeout = AcceleratorBuilder(), AutocastKwargs(cache_enabled=False), InitProcessGroupKwargs()
    builder.write(DDPMixin, kwargs_handlers=[autocast])
    builder.write(FSDPMixin, kwargs_handlers=[timeout, AutocastKwargs(cache_enabled=False)])
    assert builder.settings == {"kwargs_handlers": [autocast, timeout]}
    with pytest.raises(CompositionError, match="DDPMixin and Trainer both set the accelerator's AutocastKwargs"):
        builder.write(Trainer, kwargs_handlers=[AutocastKwargs()])


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FSDP_RESHARD_AFTER_FORWARD", "false"),
        ("FSDP_OFFLOAD_PARAMS", "true"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true"),
        ("FSDP_TRANSFORMER_CLS_TO_WRAP", "Block"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP"),
        ("FSDP_IGNORED_MODULES", "head"),
    ],
)
def test_a_launch_with_a_setting_of_fsdp_that_the_trainer_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    class Sharded(FSDPMixin, Trainer): ...

    for name, launched in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", variable: value}.items():
        monkeypatch.setenv(name, launched)
    with pytest.raises(LaunchError, match=r"The launch sets .*Sharded"):
        Sharded(**tiny_parts()).train(tiny_data(), num_epochs=1)


def test_a_launch_of_deepspeed_with_experts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Partitioned(DeepSpeedMixin, Trainer): ...

    monkeypatch.setenv("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES", "Experts")
    with pytest.raises(LaunchError, match="MOE_LAYER_CLS_NAMES=Experts, which Partitioned does not support"):
        Partitioned(**tiny_parts()).train(tiny_data(), num_epochs=1)


# ---- equal settings


@pytest.mark.parametrize(
    "settings",
    [
        {"mixed_precision": "no"},
        {"mixed_precision": None},
        {"cpu": False},
        {"kwargs_handlers": [DistributedDataParallelKwargs()]},
        {"dataloader_config": DataLoaderConfiguration()},
    ],
    ids=str,
)
def test_settings_that_equal_the_defaults_are_shared_with_a_default_trainer(settings: dict[str, Any]) -> None:
    default, explicit = Trainer(**tiny_parts()), configured(**settings)
    assert default.accelerator is explicit.accelerator


def test_the_precision_of_the_launch_equals_the_same_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    launched, given = Trainer(**tiny_parts()), Precise(**tiny_parts(), mixed_precision="bf16")
    assert launched.accelerator is given.accelerator


def test_the_order_of_handlers_makes_no_difference() -> None:
    timeout, autocast = InitProcessGroupKwargs(timeout=timedelta(minutes=3)), AutocastKwargs(cache_enabled=False)
    first, second = configured(kwargs_handlers=[timeout, autocast]), configured(kwargs_handlers=[autocast, timeout])
    assert first.accelerator is second.accelerator


# ---- different settings


def test_trainers_with_different_settings_take_turns() -> None:
    trainers = [Precise(**iris_parts(), mixed_precision="bf16"), Trainer(**iris_parts())]
    low, full = (trainer.evaluate(iris()).loss for trainer in trainers)
    assert low != full
    assert [trainer.evaluate(iris()).loss for trainer in trainers] == [low, full]
    assert [trainer.accelerator.mixed_precision for trainer in trainers] == ["bf16", "no"]
    assert [trainer.train(iris(), num_epochs=1)[-1].step for trainer in trainers] == [19, 19]


def test_the_second_trainer_is_refused_while_an_evaluation_uses_the_first() -> None:
    first, second = Trainer(**tiny_parts()), configured(kwargs_handlers=[AutocastKwargs(cache_enabled=False)])
    predictions = first.stream_predictions(tiny_data())
    next(predictions)
    with pytest.raises(AcceleratorConflictError, match=r"Configured needs .*kwargs_handlers=.*Trainer is using it"):
        second.train(tiny_data(), num_epochs=1)
    del predictions  # this ends the prediction
    assert second.train(tiny_data(), num_epochs=1)[-1].step == 3


def alternate() -> tuple[str, bool]:
    first, second = Precise(**tiny_parts(), mixed_precision="bf16"), Trainer(**tiny_parts())
    groups = []
    for trainer in (first, second, first, second):
        trainer.train(tiny_data(), num_epochs=1)
        groups.append(trainer._distributed.group)  # noqa: SLF001
    return first.accelerator.mixed_precision, all(group is groups[0] for group in groups)


def test_trainers_that_take_turns_on_several_ranks_share_their_process_groups() -> None:
    assert run_ranks(alternate, 2) == [("bf16", True)] * 2


def test_two_mixins_may_set_a_setting_to_one_value() -> None:
    builder = AcceleratorBuilder()
    builder.write(AMPMixin, mixed_precision="bf16")
    builder.write(FSDPMixin, mixed_precision="bf16")
    with pytest.raises(CompositionError, match="FSDPMixin and Precise both set the accelerator's mixed_precision"):
        builder.write(Precise, mixed_precision="no")
