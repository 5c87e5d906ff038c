"""Settings of Accelerate's `Accelerator`: which ones have an effect here, and when two sets of them are equal."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final, TypedDict, get_args

from accelerate.utils import (
    AutocastKwargs,
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
)

from ptacc.errors import OptionError
from ptacc.types.aliases import Precision


class AcceleratorSettings(TypedDict, total=False):
    """Arguments of `accelerate.Accelerator` that mixins may set."""

    mixed_precision: Precision | None
    cpu: bool
    kwargs_handlers: list[object]
    dynamo_plugin: object


HANDLERS: Final[tuple[type, ...]] = (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    InitProcessGroupKwargs,
)
ON: Final = frozenset({"1", "true", "yes", "on", "y", "t"})
INSTEAD: Final[Mapping[str, str]] = {
    "device_placement": "A run moves the model and its batches to the device.",
    "split_batches": "Give train() the per_device_batch_size of one process.",
    "dispatch_batches": "Each process loads its own batches. Pass data_is_sharded=True if it has its own data.",
    "even_batches": "Every sample is used once: none is repeated to fill a batch.",
    "use_seedable_sampler": "The order of the data follows from the seed of the run: see SeedMixin.",
    "data_seed": "The order of the data follows from the seed of the run: see SeedMixin.",
    "non_blocking": "Batches in pinned memory are copied without blocking.",
    "use_stateful_dataloader": "Runs resume within an epoch with any loader. Pass a StatefulDataLoader to use one.",
    "gradient_accumulation_steps": "Compose GradAccumMixin.",
    "gradient_accumulation_plugin": "Compose GradAccumMixin.",
    "deepspeed_plugin": "Compose DeepSpeedMixin.",
    "deepspeed_plugins": "Compose DeepSpeedMixin.",
    "fsdp_plugin": "Compose FSDPMixin.",
    "parallelism_config": "Compose TensorParallelMixin.",
    "torch_tp_plugin": "Compose TensorParallelMixin.",
    "dynamo_backend": "Compose CompileMixin.",
    "rng_types": "A run restores the states of all random generators.",
    "step_scheduler_with_optimizer": "Compose LRSchedulerMixin.",
    "ProfileKwargs": "Compose ProfilerMixin.",
}
"""Settings without an effect, each with what to do instead."""


def check_settings(writer: str, settings: Mapping[str, Any]) -> None:
    """Raise `OptionError` for a setting that a trainer would ignore."""
    for name in ignored_settings(settings):
        raise OptionError(
            f"{writer} sets the accelerator's {name}, which has no effect here. {INSTEAD.get(name, '')}".rstrip()
        )
    precision = settings.get("mixed_precision")
    if precision is not None and precision not in get_args(Precision):
        raise OptionError(
            f"{writer} sets mixed_precision={precision!r}: must be one of {', '.join(get_args(Precision))}."
        )


def ignored_settings(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of the settings that have no effect."""
    for name, value in settings.items():
        if name == "dataloader_config" and isinstance(value, DataLoaderConfiguration):
            default = DataLoaderConfiguration()
            for field in dataclasses.fields(value):
                if getattr(value, field.name) != getattr(default, field.name):
                    yield field.name
        elif name not in AcceleratorSettings.__annotations__:
            yield name
    for handler in settings.get("kwargs_handlers") or ():
        if not isinstance(handler, HANDLERS):
            yield type(handler).__name__


def effective_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the launch's values for those that are not given, so that equal ones compare equal."""
    handlers = settings.get("kwargs_handlers") or ()
    return {
        "mixed_precision": settings.get("mixed_precision")
        or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower(),
        "cpu": settings.get("cpu") or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ON,
        "dynamo_plugin": settings.get("dynamo_plugin") or TorchDynamoPlugin(),
        "kwargs_handlers": {type(handler).__name__: handler for handler in handlers if handler != type(handler)()},
    }


def check_effective_settings(owner: str, settings: Mapping[str, Any], features: Collection[str]) -> None:
    """Raise `OptionError` for a precision of the launch that is unknown, and for settings of DDP without DDP."""
    check_settings("The launch", {"mixed_precision": settings["mixed_precision"]})
    if "ddp" not in features and DistributedDataParallelKwargs.__name__ in settings["kwargs_handlers"]:
        raise OptionError(
            f"{owner} sets DistributedDataParallelKwargs, which have no effect without DDPMixin. Compose it, and set "
            "its options."
        )
