"""The one adapter over Accelerate: how its `Accelerator` is configured, made once, shared, and checked."""

from __future__ import annotations

import contextlib
import gc
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypedDict

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from torch.distributed import is_initialized
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Unpack

from ptacc.distributed.failure import open_connections
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import AcceleratorConflictError, CompositionError, LaunchError, OptionError
from ptacc.types.aliases import Precision
from ptacc.types.protocols import AcceleratorProtocol


class AcceleratorSettings(TypedDict, total=False):
    """What mixins may write of `accelerate.Accelerator`'s settings."""

    mixed_precision: Precision | None
    cpu: bool
    kwargs_handlers: list[object]
    dynamo_plugin: object
    deepspeed_plugin: object
    fsdp_plugin: object
    parallelism_config: object


@dataclass
class AcceleratorBuilder:
    """The settings of an accelerator, each written once: two mixins that write one of them are an error.

    `replica_size` is the number of processes that share one replica of the model, None for all of them.

    Example:
        >>> from ptacc import AMPMixin
        >>> builder = AcceleratorBuilder()
        >>> builder.write(AMPMixin, mixed_precision="bf16")
        >>> builder.settings
        {'mixed_precision': 'bf16'}
    """

    settings: dict[str, Any] = field(default_factory=dict)
    provided: set[str] = field(default_factory=set)
    taken_over: set[str] = field(default_factory=set)
    replica_size: int | None = 1
    _writers: dict[str, str] = field(default_factory=dict)

    def write(self, writer: type, **settings: Unpack[AcceleratorSettings]) -> None:
        """Set what `writer` is concerned with.

        Raises:
            CompositionError: Another mixin has written one of these settings already.
        """
        for name, value in settings.items():
            if name in self._writers:
                raise CompositionError(
                    f"{self._writers[name]} and {writer.__name__} both set the accelerator's {name}. "
                    "Compose one of them only."
                )
            self._writers[name] = writer.__name__
            self.settings[name] = value

    def provide(self, feature: str) -> None:
        """Say that the trainer knows what to do when the launch asks for `feature` (a key of `LAUNCH_FEATURES`)."""
        self.provided.add(feature)

    def take_over(self, feature: str) -> None:
        """Say that the trainer does by itself what the launch asks for: Accelerate does not hear of it."""
        self.provided.add(feature)
        self.taken_over.add(feature)


@dataclass(frozen=True)
class LaunchVariable:
    """Something that a launch can ask for by an environment variable, and a mixin has to provide."""

    variable: str
    idle: frozenset[str]
    mixin: str


OFF: Final = frozenset({"", "0", "no", "false"})
LAUNCH_VARIABLES: Final[Mapping[str, LaunchVariable]] = {
    "accumulation": LaunchVariable("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", OFF | {"1"}, "GradAccumMixin"),
    "deepspeed": LaunchVariable("ACCELERATE_USE_DEEPSPEED", OFF, "DeepSpeedMixin"),
    "fsdp": LaunchVariable("ACCELERATE_USE_FSDP", OFF, "FSDPMixin"),
    "dynamo": LaunchVariable("ACCELERATE_DYNAMO_BACKEND", OFF, "CompileMixin"),
    "megatron": LaunchVariable("ACCELERATE_USE_MEGATRON_LM", OFF, "no mixin of ptacc"),
    "parallelism": LaunchVariable("ACCELERATE_USE_PARALLELISM_CONFIG", OFF, "TensorParallelMixin"),
}


@dataclass
class _Shared:
    """The accelerator of this process: Accelerate keeps its state in the process, so there is one at a time."""

    accelerator: Accelerator
    distributed: DistributedRuntime
    settings: dict[str, Any]
    owners: weakref.WeakSet[object]
    process: int = field(default_factory=os.getpid)


_shared: list[_Shared] = []
_connected_before: dict[int, frozenset[tuple[int, int]]] = {}
"""By process: a fork has other connections."""


def acquire_accelerator(owner: object, builder: AcceleratorBuilder) -> tuple[AcceleratorProtocol, DistributedRuntime]:
    """Return the accelerator with these settings, made at the first call and shared by all who ask for the same.

    Args:
        owner: The trainer that asks.
        builder: The settings it needs.

    Raises:
        AcceleratorConflictError: Another living trainer has one with other settings.
        LaunchError: The launch asks for what the trainer cannot give, or its processes do not see each other.
        OptionError: fp16 on a device where it would silently be fp32.
    """
    check_launch_environment(builder)
    check_restarts()
    if _shared and _shared[0].process != os.getpid():
        release_accelerator()  # forked, as notebook launchers do: what the parent had belongs to its own launch
    if _shared and _shared[0].settings != builder.settings:
        gc.collect()  # a trainer that nobody holds any more must not be in the way
        others = [other for other in _shared[0].owners if other is not owner]
        if others:
            raise AcceleratorConflictError(
                f"{type(owner).__name__} needs an accelerator with {describe(builder.settings)}, and "
                f"{type(others[0]).__name__} holds this process's one with {describe(_shared[0].settings)}. "
                "Delete that trainer first, or give both the same options."
            )
        release_accelerator()
    if not _shared:
        plugin = GradientAccumulationPlugin(num_steps=1)  # or the launch's own number would scale the loss
        connected_before = connections_before_launch()
        with hidden_environment(builder.taken_over):
            accelerator = Accelerator(gradient_accumulation_plugin=plugin, **builder.settings)
        try:
            check_accelerator(accelerator)
        except Exception:
            release_accelerator()  # or the next trainer would inherit what was refused
            raise
        distributed = DistributedRuntime.from_process_group(connected_before)
        _shared.append(_Shared(accelerator, distributed, builder.settings, weakref.WeakSet()))
    _shared[0].owners.add(owner)
    distributed = _shared[0].distributed
    return _shared[0].accelerator, distributed.with_replica_size(builder.replica_size or distributed.world_size)


def connections_before_launch() -> frozenset[tuple[int, int]]:
    """Return the connections that this process had before it joined the others: those are not theirs."""
    if not is_initialized():
        _connected_before[os.getpid()] = open_connections()
    return _connected_before.get(os.getpid(), frozenset())


def release_accelerator() -> None:
    """Forget the accelerator of this process, so that the next trainer makes one with settings of its own."""
    _shared.clear()
    # The only way to another precision. A process group, where there is one, stays.
    AcceleratorState._reset_state(reset_partial_state=not is_initialized())  # noqa: SLF001


def check_launch_environment(builder: AcceleratorBuilder) -> None:
    """Raise `LaunchError` where the launch asks for something that no mixin of this trainer provides."""
    for name, feature in LAUNCH_VARIABLES.items():
        value = os.environ.get(feature.variable, "")
        if value.lower() not in feature.idle and name not in builder.provided:
            raise LaunchError(
                f"The launch set {feature.variable}={value}, and this trainer has nothing that would do it: it needs "
                f"{feature.mixin}. Compose it, or launch without."
            )


@contextlib.contextmanager
def hidden_environment(features: Iterable[str]) -> Iterator[None]:
    """Keep what the launch asks for from Accelerate for the block.

    Raises:
        LaunchError: Accelerate has heard of it before.
    """
    if "deepspeed" in features and PartialState._shared_state.get("distributed_type") == "DEEPSPEED":  # noqa: SLF001
        raise LaunchError(
            "The launch asks for DeepSpeed, and Accelerate has set it up by itself, for an Accelerator or a "
            "PartialState that was made before the trainer. Make none, or make it after `trainer.accelerator`."
        )
    hidden = {LAUNCH_VARIABLES[name].variable for name in features} & os.environ.keys()
    values = {name: os.environ.pop(name) for name in hidden}
    try:
        yield
    finally:
        os.environ.update(values)


def check_restarts() -> None:
    """Raise `LaunchError` where torchrun would restart processes that can never meet.

    They would meet in the agent's own store, in which those before them left their addresses.

    Source: https://github.com/pytorch/pytorch/issues/135712
    """
    restarts, shares = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"), "TORCHELASTIC_USE_AGENT_STORE"
    if restarts != "0" and os.environ.get(shares) == "True" and os.environ.get("WORLD_SIZE", "1") != "1":
        raise LaunchError(
            f"torchrun --max-restarts {restarts}: processes that it restarts would find the addresses of those that "
            "are gone, and wait for them. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment."
        )


def check_accelerator(accelerator: AcceleratorProtocol) -> None:
    """Raise where an accelerator would silently do something else than was asked for."""
    world_size = int(os.environ.get("WORLD_SIZE") or 1)
    if world_size > 1 and accelerator.num_processes == 1:
        raise LaunchError(
            f"WORLD_SIZE={world_size}, and Accelerate sees 1 process: {world_size} trainings would run that know "
            "nothing of each other. Without a GPU, launch with ACCELERATE_USE_CPU=true set in the environment."
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise OptionError(
            'mixed_precision="fp16" on a CPU: Accelerate would silently train in fp32. Use "bf16", or "no".'
        )


@dataclass(frozen=True)
class ModelState:
    """What a run may change of a user's model beside its weights, to be put back at its end."""

    training: tuple[tuple[nn.Module, bool], ...]
    patched: Mapping[str, object]
    syncing: tuple[DistributedDataParallel, bool] | None = None

    PATCHES = ("forward", "_original_forward", "_is_accelerate_prepared")

    @classmethod
    def of(cls, model: nn.Module) -> ModelState:
        """Remember the state of `model`."""
        patched = {name: model.__dict__[name] for name in cls.PATCHES if name in model.__dict__}
        replica = find_ddp_module(model)
        syncing = None if replica is None else (replica, replica.require_forward_param_sync)
        return cls(tuple((module, module.training) for module in model.modules()), patched, syncing)

    def restore_flags(self) -> None:
        """Put each module's train flag back, and whether the next forward pass gives all processes rank 0's buffers.

        A forward pass without gradients takes that away from the one after it.
        """
        for module, training in self.training:
            module.training = training
        if self.syncing is not None:
            self.syncing[0].require_forward_param_sync = self.syncing[1]

    def restore(self, model: nn.Module) -> None:
        """Put everything back."""
        for name in self.PATCHES:
            model.__dict__.pop(name, None)
        model.__dict__.update(self.patched)
        self.restore_flags()


def find_ddp_module(model: nn.Module) -> DistributedDataParallel | None:
    """Return the wrapper that averages gradients over the processes, be it compiled or not; None without one."""
    inner = model if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, DistributedDataParallel) else None


def forget_prepared(accelerator: AcceleratorProtocol) -> None:
    """Let go of the models that Accelerate prepared and keeps hold of.

    Its own `free_memory` collects garbage, too, which takes longer than a small evaluation.
    """
    if isinstance(accelerator, Accelerator):
        accelerator._models.clear()  # noqa: SLF001


def describe(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items()) or "default settings"
