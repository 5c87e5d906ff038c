"""The accelerator of this process: its settings, its creation, and checks of the launch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from torch.distributed import is_initialized
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Unpack

from ptacc.distributed.accelerator_settings import (
    AcceleratorSettings,
    check_effective_settings,
    check_settings,
    effective_settings,
)
from ptacc.distributed.failure import open_connections
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.distributed.startup import all_ranks_started
from ptacc.errors import AcceleratorConflictError, CompositionError, LaunchError, OptionError
from ptacc.tensors.devices import check_device
from ptacc.types.protocols import AcceleratorProtocol


@dataclass
class AcceleratorBuilder:
    """Collects the settings of an accelerator from the mixins of a trainer. Each setting has one writer.

    `kwargs_handlers` of several writers are joined; each kind has one writer.

    `replica_size` is the number of ranks that share one replica of the model; None for all ranks.

    Example:
        >>> from ptacc import AMPMixin
        >>> builder = AcceleratorBuilder()
        >>> builder.write(AMPMixin, mixed_precision="bf16")
        >>> builder.settings
        {'mixed_precision': 'bf16'}
    """

    settings: dict[str, Any] = field(default_factory=dict)
    provided: set[str] = field(default_factory=set)
    hidden: set[str] = field(default_factory=set)
    replica_size: int | None = 1
    _writers: dict[str, str] = field(default_factory=dict)
    _handlers: dict[type, tuple[object, str]] = field(default_factory=dict)

    def write(self, writer: type, **settings: Unpack[AcceleratorSettings]) -> None:
        """Set settings on behalf of the mixin `writer`.

        Raises:
            CompositionError: Another mixin has set one of them to another value.
            OptionError: A setting has no effect on a trainer.
        """
        check_settings(writer.__name__, settings)
        handlers = {type(handler): handler for handler in settings.pop("kwargs_handlers", None) or ()}
        for kind, handler in handlers.items():
            if self._handlers.setdefault(kind, (handler, writer.__name__))[0] != handler:
                raise CompositionError(
                    f"{self._handlers[kind][1]} and {writer.__name__} both set the accelerator's {kind.__name__}, and "
                    "their values differ. Compose one of them only."
                )
        if handlers:
            self.settings["kwargs_handlers"] = [handler for handler, _ in self._handlers.values()]
        for name, value in settings.items():
            if name in self._writers and self.settings[name] != value:
                raise CompositionError(
                    f"{self._writers[name]} and {writer.__name__} both set the accelerator's {name}, and their "
                    "values differ. Compose one of them only."
                )
            self._writers[name] = writer.__name__
            self.settings[name] = value

    def provide(self, feature: str, *, hide: bool = False) -> None:
        """Declare that the trainer supports a feature that a launch can request.

        Args:
            feature: A key of `LAUNCH_FEATURES`.
            hide: Whether to hide the request from Accelerate, because the trainer sets the feature up itself.
        """
        self.provided.add(feature)
        if hide:
            self.hidden.add(feature)


class LaunchFeature(NamedTuple):
    """A feature that a launch requests by an environment variable, and that a mixin has to support."""

    variable: str
    off_values: frozenset[str]
    mixin: str


OFF: Final = frozenset({"", "0", "no", "false"})
LAUNCH_FEATURES: Final[Mapping[str, LaunchFeature]] = {
    "accumulation": LaunchFeature("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", OFF | {"1"}, "GradAccumMixin"),
    "deepspeed": LaunchFeature("ACCELERATE_USE_DEEPSPEED", OFF, "DeepSpeedMixin"),
    "fsdp": LaunchFeature("ACCELERATE_USE_FSDP", OFF, "FSDPMixin"),
    "dynamo": LaunchFeature("ACCELERATE_DYNAMO_BACKEND", OFF, "CompileMixin"),
    "megatron": LaunchFeature("ACCELERATE_USE_MEGATRON_LM", OFF, "no mixin of ptacc"),
    "parallelism": LaunchFeature("ACCELERATE_USE_PARALLELISM_CONFIG", OFF, "TensorParallelMixin"),
}


@dataclass
class _SharedAccelerator:
    """The accelerator of this process. Accelerate's state is global, so that there is one at a time.

    `users` are the trainers within a run, an evaluation or a prediction.
    """

    accelerator: Accelerator
    distributed: DistributedRuntime
    given: dict[str, Any]
    settings: dict[str, Any]
    users: list[object] = field(default_factory=list)
    process: int = field(default_factory=os.getpid)


_shared: list[_SharedAccelerator] = []
_connections_before_init: dict[int, frozenset[tuple[int, int]]] = {}
"""Connections by process id, since a forked process has its own."""


def acquire_accelerator(owner: object, builder: AcceleratorBuilder) -> tuple[AcceleratorProtocol, DistributedRuntime]:
    """Return the accelerator with these settings. Trainers whose settings have the same effect share it.

    An accelerator with other settings is discarded, unless a trainer is using it.

    Raises:
        AcceleratorConflictError: Another trainer is using an accelerator with other settings.
        LaunchError: The launch requests a feature that the trainer lacks, or its processes are not connected.
        OptionError: A precision that is not supported, such as fp8, or fp16 on a CPU, where Accelerate would train in
            fp32.
    """
    check_launch_environment(builder)
    check_restarts()
    if _shared and _shared[0].process != os.getpid():
        release_accelerator()  # forked, as by a notebook launcher: the parent's accelerator is of another launch
    settings = effective_settings(builder.settings)
    check_effective_settings(type(owner).__name__, settings, builder.provided)
    previous = None
    if _shared and _shared[0].settings != settings:
        if _shared[0].users:
            raise AcceleratorConflictError(
                f"{type(owner).__name__} needs an accelerator with {describe(builder.settings)}, and the one of this "
                f"process has {describe(_shared[0].given)}: {type(_shared[0].users[0]).__name__} is using it for a "
                "run, an evaluation or a prediction. Wait for its end, or give both the same options."
            )
        previous = _shared[0].distributed if is_initialized() else None
        release_accelerator()
    if not _shared:
        _shared.append(make_accelerator(builder, settings, previous))
    distributed = _shared[0].distributed
    return _shared[0].accelerator, distributed.with_replica_size(builder.replica_size or distributed.world_size)


def is_current(accelerator: AcceleratorProtocol) -> bool:
    """Return whether an accelerator is that of this process: it was neither discarded, nor is it a parent's."""
    return bool(_shared) and _shared[0].accelerator is accelerator and _shared[0].process == os.getpid()


@contextlib.contextmanager
def using_accelerator(user: object) -> Generator[None]:
    """Keep the accelerator of a trainer for the block."""
    shared = _shared[0]
    shared.users.append(user)
    try:
        yield
    finally:
        shared.users.remove(user)


def make_accelerator(
    builder: AcceleratorBuilder, settings: dict[str, Any], previous: DistributedRuntime | None
) -> _SharedAccelerator:
    """Create an accelerator, and the process group of the launch unless it exists.

    `settings` are the effective ones. `previous` are the ranks of the accelerator before, if their group is the same.
    """
    plugin = GradientAccumulationPlugin(num_steps=1)  # the launch's own number would make Accelerate scale the loss
    if not is_initialized():
        _connections_before_init[os.getpid()] = open_connections()
    with hidden_environment(builder.hidden), all_ranks_started():
        accelerator = Accelerator(gradient_accumulation_plugin=plugin, **builder.settings)
    try:
        check_accelerator(accelerator)
    except Exception:
        release_accelerator()  # the next trainer must not use an invalid accelerator
        raise
    distributed = previous or DistributedRuntime.from_process_group(_connections_before_init.get(os.getpid()))
    return _SharedAccelerator(accelerator, distributed, builder.settings, settings)


def release_accelerator() -> None:
    """Discard the accelerator of this process, so that the next trainer can create one with other settings."""
    _shared.clear()
    # The only way to change the precision. An initialised process group stays.
    AcceleratorState._reset_state(reset_partial_state=not is_initialized())  # noqa: SLF001


def check_launch_environment(builder: AcceleratorBuilder) -> None:
    """Raise `LaunchError` if the launch requests a feature that no mixin of the trainer supports."""
    for name, feature in LAUNCH_FEATURES.items():
        value = os.environ.get(feature.variable, "")
        if value.lower() not in feature.off_values and name not in builder.provided:
            raise LaunchError(
                f"The launch set {feature.variable}={value}, which this trainer does not support: it needs "
                f"{feature.mixin}. Compose it, or launch without."
            )


@contextlib.contextmanager
def hidden_environment(features: Iterable[str]) -> Generator[None]:
    """Remove the environment variables of `features` for the block.

    Raises:
        LaunchError: Accelerate has already read the one for DeepSpeed.
    """
    if "deepspeed" in features and PartialState._shared_state.get("distributed_type") == "DEEPSPEED":  # noqa: SLF001
        raise LaunchError(
            "The launch asks for DeepSpeed, and Accelerate has set it up by itself, for an Accelerator or a "
            "PartialState that was made before the trainer. Make none, or make it after `trainer.accelerator`."
        )
    variables = {LAUNCH_FEATURES[name].variable for name in features} & os.environ.keys()
    values = {name: os.environ.pop(name) for name in variables}
    try:
        yield
    finally:
        os.environ.update(values)


def check_restarts() -> None:
    """Raise `LaunchError` if torchrun would restart processes that could not connect to each other.

    With a shared agent store, restarted processes read the addresses that the previous ones stored there.

    Source: https://github.com/pytorch/pytorch/issues/135712
    """
    restarts, shares = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"), "TORCHELASTIC_USE_AGENT_STORE"
    if restarts != "0" and os.environ.get(shares) == "True" and os.environ.get("WORLD_SIZE", "1") != "1":
        raise LaunchError(
            f"torchrun --max-restarts {restarts}: processes that it restarts would find the addresses of those that "
            "are gone, and wait for them. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment."
        )


def check_accelerator(accelerator: AcceleratorProtocol) -> None:
    """Raise if the accelerator would silently differ from what was requested, or ptacc does not support its device."""
    check_device(accelerator.device)
    world_size = int(os.environ.get("WORLD_SIZE") or 1)
    if world_size > 1 and accelerator.num_processes == 1:
        raise LaunchError(
            f"WORLD_SIZE={world_size}, and Accelerate sees 1 process: {world_size} independent trainings would run. "
            "Without a GPU, launch with ACCELERATE_USE_CPU=true set in the environment."
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise OptionError(
            'mixed_precision="fp16" on a CPU: Accelerate would silently train in fp32. Use "bf16", or "no".'
        )


def wrap_in_ddp(accelerator: AcceleratorProtocol, model: nn.Module) -> DistributedDataParallel:
    """Wrap a model that is on the device, with the accelerator's settings. A collective."""
    assert isinstance(accelerator, Accelerator)
    settings = accelerator.ddp_handler
    ddp = DistributedDataParallel(model, **({} if settings is None else settings.to_kwargs()))
    if settings is not None:
        settings.register_comm_hook(ddp)
    return ddp


def forget_prepared(accelerator: AcceleratorProtocol) -> None:
    """Drop Accelerate's references to prepared models.

    Its `free_memory` also collects garbage, which takes longer than a small evaluation.
    """
    if isinstance(accelerator, Accelerator):
        accelerator._models.clear()  # noqa: SLF001


def describe(settings: Mapping[str, object]) -> str:
    """Return settings as text for an error message."""
    return ", ".join(f"{name}={value!r}" for name, value in settings.items()) or "default settings"
