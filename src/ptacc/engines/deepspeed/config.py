"""DeepSpeed's configuration: read, held against the trainer, and completed from it. This does not import DeepSpeed.

```
option, else configuration, else launch, else default -> ZeroConfig.read() -> check_agrees() -> for_deepspeed()
```
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from ptacc.errors import OptionError
from ptacc.types.aliases import ZeroStage

STAGES: Final = get_args(ZeroStage)
AUTO: Final = "auto"
"""What a configuration says where it leaves a value to the trainer, or to DeepSpeed."""
OFFLOAD_DEVICES: Final[Mapping[object, bool | None]] = {None: None, AUTO: None, "none": False, "cpu": True}
UNSUPPORTED: Final[Mapping[str, str]] = {
    "optimizer": "The trainer has one.",
    "scheduler": "create_scheduler of LRSchedulerMixin makes one.",
    "amp": "mixed_precision of AMPMixin says what is computed in.",
    "torch_autocast": "mixed_precision of AMPMixin says what is computed in.",
    "elasticity": "It would change batch sizes.",
    "tensor_parallel": "Each process trains on batches of its own.",
    "sequence_parallel_size": "Each process trains on batches of its own.",
    "zero_optimization.round_robin_gradients": "With it, DeepSpeed looks for whole weights in the wrong places.",
    "zero_optimization.zenflow": "It updates weights between the trainer's steps.",
    "zero_optimization.mics_shard_size": "What is dealt out is put together over all processes.",
    "zero_optimization.zero_hpz_partition_size": "What is dealt out is put together over all processes.",
}
"""Keys that nothing can be done with here, each with the reason. Others are DeepSpeed's own concern."""
DISABLED: Final = (None, False, 0, 1, -1)
"""What such a key says where it asks for nothing."""


@dataclass(frozen=True)
class LaunchOptions:
    """What `accelerate launch --use_deepspeed` asks for: None where it says nothing."""

    config: str | None = None
    stage: int | str = 2
    offload_optimizer: str | None = None
    offload_param: str | None = None

    @classmethod
    def from_environment(cls) -> LaunchOptions:
        """Read what the launcher left."""
        read = os.environ.get
        config, stage = read("ACCELERATE_DEEPSPEED_CONFIG_FILE"), read("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        return cls(
            None if config in ("", "none") else config,
            int(stage) if stage.isdigit() else stage,
            read("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"),
            read("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"),
        )


@dataclass(frozen=True)
class ZeroConfig:
    """What is known of a configuration before the run.

    Args:
        owner: The trainer's class, for errors.
        stage: 0 for replicas; 1 deals out the optimizer's state, 2 the gradients, too, and 3 the weights, too.
        offload_optimizer: Whether the optimizer's state is on the host, where it steps.
        offload_param: Whether weights are on the host until they are needed.
        given: The user's own configuration.
    """

    owner: str
    stage: int
    offload_optimizer: bool
    offload_param: bool
    given: Mapping[str, Any]

    @classmethod
    def read(
        cls,
        owner: str,
        config: Mapping[str, object] | str | Path | None,
        stage: ZeroStage | None,
        offload_optimizer: bool | None,
        offload_param: bool | None,
    ) -> ZeroConfig:
        """Put together what options, the configuration and the launch say.

        Raises:
            OptionError: The configuration cannot be read, sets what is refused, or says something else than an option.
        """
        launched = LaunchOptions.from_environment()
        given = read_config(owner, config if config is not None else launched.config)
        for key, reason in UNSUPPORTED.items():
            if not is_disabled(value_at(given, key)):
                raise OptionError(f"{owner}: the DeepSpeed configuration sets {key}. {reason} Leave it out.")
        key = "zero_optimization.stage"
        chosen = resolve(owner, ("zero_stage", stage), (key, value_at(given, key)))
        resolved: Any = chosen if chosen is not None else launched.stage
        if resolved not in STAGES or isinstance(resolved, bool):
            raise OptionError(f"{owner}(zero_stage={resolved!r}): must be 0, 1, 2 or 3.")
        optimizer = resolve_offload(owner, "offload_optimizer", offload_optimizer, given, launched.offload_optimizer)
        param = resolve_offload(owner, "offload_param", offload_param, given, launched.offload_param)
        for name, is_asked, smallest in (("optimizer", optimizer, 1), ("param", param, 3)):
            if is_asked and resolved < smallest:
                raise OptionError(
                    f"{owner}(zero_offload_{name}=True) with ZeRO {resolved}, which deals nothing of that out. Take "
                    f"zero_stage={smallest} or more."
                )
        return cls(owner, resolved, optimizer, param, given)

    @property
    def has_bf16_weights(self) -> bool:
        """Whether weights are put together and computed with in bfloat16, beside those in float32 that are updated."""
        return value_at(self.given, "bf16.enabled") is True

    def check_agrees(self, *, accumulation: int, max_grad_norm: float | None, precision: str) -> None:
        """Raise `OptionError` where the configuration says something else than the trainer; the error names both."""
        clipping = value_at(self.given, "gradient_clipping")
        self._compare("gradient_accumulation_steps", "gradient_accumulation_steps", accumulation)
        if clipping is not None and (clipping or None) != max_grad_norm:
            raise self._disagreement("gradient_clipping", clipping, f"max_grad_norm={max_grad_norm}")
        for name in ("bf16", "fp16"):
            if value_at(self.given, f"{name}.enabled") is True and precision != name:
                raise self._disagreement(f"{name}.enabled", True, f"mixed_precision={precision!r}")
        if precision == "fp16":
            raise OptionError(
                f'{self.owner}(mixed_precision="fp16"): scaled losses are not for DeepSpeed here. Use "bf16", or '
                "FSDPMixin."
            )
        if self.has_bf16_weights and self.stage < 2:
            raise OptionError(
                f"{self.owner}: the DeepSpeed configuration sets bf16.enabled, which needs zero_stage=2 or 3 here, and "
                f'has {self.stage}. Leave it out: mixed_precision="bf16" computes in bfloat16 by itself.'
            )

    def check_batch_size(self, size: int | None, accumulation: int, processes: int) -> None:
        """Raise `OptionError` where the configuration has another batch size than `train()` was given."""
        if size is None:
            return
        self._compare("train_micro_batch_size_per_gpu", "per_device_batch_size", size)
        total = value_at(self.given, "train_batch_size")
        if total not in (None, size * accumulation * processes):
            ours = f"per_device_batch_size={size} x {accumulation} batches a step x {processes} processes"
            raise self._disagreement("train_batch_size", total, ours)

    def to_deepspeed(self) -> dict[str, Any]:
        """Return the configuration to give to DeepSpeed, in which windows, clipping and scaling are the trainer's."""
        config = drop_auto(self.given)
        for key in ("train_batch_size", "fp16"):
            config.pop(key, None)
        zero = config.setdefault("zero_optimization", {})
        zero["stage"] = self.stage
        for key, is_on_host in (("offload_optimizer", self.offload_optimizer), ("offload_param", self.offload_param)):
            zero[key] = (zero.get(key) or {}) | {"device": "cpu" if is_on_host else "none"}
        if self.stage in (1, 2) and not self.offload_optimizer:
            zero.setdefault("compute_grad_norm", False)  # nobody asks for it, and it waits for the device
        if self.has_bf16_weights:
            config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        config.setdefault("train_micro_batch_size_per_gpu", 1)  # told to nobody but DeepSpeed's logs
        config.setdefault("steps_per_print", sys.maxsize)
        config.setdefault("timers", {}).setdefault("throughput", {"enabled": False})  # waits for the device, too
        config.setdefault("zero_force_ds_cpu_optimizer", False)
        return config | {
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "managed_gradient_accumulation": True,
            "zero_allow_untested_optimizer": True,
        }

    def _compare(self, key: str, option: str, value: int) -> None:
        there = value_at(self.given, key)
        if there is not None and there != value:
            raise self._disagreement(key, there, f"{option}={value}")

    def _disagreement(self, key: str, there: object, ours: str) -> OptionError:
        return OptionError(
            f"{self.owner}: the DeepSpeed configuration has {key}={there}, and the trainer {ours}. Write "
            f'"{AUTO}" there, or leave it out.'
        )


# ---- reading


def read_config(owner: str, config: Mapping[str, object] | str | Path | None) -> Mapping[str, Any]:
    """Return a configuration, read from its file if it is a path.

    Raises:
        OptionError: There is no such file, or no JSON object in it.
    """
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return config
    if not isinstance(config, str | Path):
        raise OptionError(f"{owner}(deepspeed_config={config!r}): must be a mapping, or the path of a JSON file.")
    try:
        read = json.loads(Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"{owner}(deepspeed_config={str(config)!r}) cannot be read: {error}.") from error
    if not isinstance(read, dict):
        raise OptionError(f"{owner}(deepspeed_config={str(config)!r}): the file holds no JSON object.")
    return read


def value_at(config: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path, None where there is none or it is left open.

    Example:
        >>> value_at({"zero_optimization": {"stage": 3, "overlap_comm": "auto"}}, "zero_optimization.stage")
        3
    """
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return None if value == AUTO else value


def is_disabled(value: object) -> bool:
    """Say whether a value asks for nothing.

    Example:
        >>> is_idle({"enabled": False}), is_idle(True), is_idle(1)
        (True, False, True)
    """
    return value.get("enabled") is False if isinstance(value, Mapping) else value is not True and value in DISABLED


def drop_auto(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy without what is left open, which is then DeepSpeed's own default.

    Example:
        >>> without_auto({"zero_optimization": {"stage": 3, "overlap_comm": "auto"}, "train_batch_size": "auto"})
        {'zero_optimization': {'stage': 3}}
    """
    return {
        key: drop_auto(value) if isinstance(value, Mapping) else value for key, value in config.items() if value != AUTO
    }


def resolve(owner: str, option: tuple[str, Any], there: tuple[str, Any]) -> Any:
    """Return what an option says, or else the configuration, both given with their names; None if neither does.

    Raises:
        OptionError: They say different things.
    """
    if option[1] is not None and there[1] is not None and option[1] != there[1]:
        raise OptionError(
            f"{owner}({option[0]}={option[1]!r}), and the DeepSpeed configuration has {there[0]}={there[1]!r}. Leave "
            "out one of them."
        )
    return there[1] if option[1] is None else option[1]


def resolve_offload(owner: str, name: str, option: bool | None, given: Mapping[str, Any], launched: str | None) -> bool:
    """Say whether something is kept on the host.

    Raises:
        OptionError: It is asked to be elsewhere, where nobody here could read it; or two say different things.
    """
    key = f"zero_optimization.{name}.device"
    in_config = value_at(given, key)
    for device in (in_config, launched):
        if device not in OFFLOAD_DEVICES:
            raise OptionError(f'{owner}: {key}={device!r}: must be "cpu" or "none".')
    chosen = resolve(owner, (f"zero_{name}", option), (key, OFFLOAD_DEVICES[in_config]))
    return bool(OFFLOAD_DEVICES[launched] if chosen is None else chosen)
