"""DeepSpeed's configuration: read, compared with the trainer's options, and completed. This does not import DeepSpeed.

```
option, else configuration, else launch, else default -> ZeroConfig.read() -> check_agrees() -> to_deepspeed()
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
from ptacc.types.accumulation import AccumulationSchedule
from ptacc.types.aliases import ZeroStage

AUTO: Final = "auto"
"""The value with which a configuration leaves a setting to the trainer or to DeepSpeed."""
OFFLOAD_DEVICES: Final[Mapping[object, bool | None]] = {None: None, AUTO: None, "none": False, "cpu": True}
"""Devices to offload to, each with whether it offloads; None if it is not set."""
UNSUPPORTED: Final[Mapping[str, str]] = {
    "optimizer": "The trainer has one.",
    "scheduler": "Schedulers are made by create_scheduler of LRSchedulerMixin.",
    "amp": "Precision is set by mixed_precision of AMPMixin.",
    "torch_autocast": "Precision is set by mixed_precision of AMPMixin.",
    "elasticity": "It would change batch sizes.",
    "tensor_parallel": "Each rank trains on batches of its own.",
    "sequence_parallel_size": "Each rank trains on batches of its own.",
    "zero_optimization.round_robin_gradients": "With it, DeepSpeed gathers full weights from the wrong offsets.",
    "zero_optimization.zenflow": "It updates weights between the trainer's steps.",
    "zero_optimization.mics_shard_size": "Partitions are gathered over all ranks.",
    "zero_optimization.zero_hpz_partition_size": "Partitions are gathered over all ranks.",
}
"""Keys that raise an error, each with the reason. All others are passed on to DeepSpeed."""
DISABLED: Final = (None, False, 0, 1, -1)
"""Values with which such a key changes nothing."""


@dataclass(frozen=True)
class ZeroConfig:
    """The settings of ZeRO, resolved from options, configuration and launch.

    Args:
        owner: The trainer's class, for error messages.
        stage: 0 for replicas. ZeRO partitions the optimizer's state (1), also the gradients (2), and the weights (3).
        offload_optimizer: Whether the optimizer's state is in host memory, and the optimizer steps there.
        offload_param: Whether weights are in host memory until they are gathered.
        given: The user's configuration.
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
        config: Mapping[str, object] | str | os.PathLike[str] | None,
        stage: ZeroStage | None,
        offload_optimizer: bool | None,
        offload_param: bool | None,
    ) -> ZeroConfig:
        """Resolve the options, the configuration and the launch.

        Raises:
            OptionError: The configuration cannot be read, has an unsupported key, or contradicts an option.
        """
        given = read_config(owner, config if config is not None else launch_option("CONFIG_FILE"))
        for key, reason in UNSUPPORTED.items():
            if not is_disabled(value_at(given, key)):
                raise OptionError(f"{owner}: the DeepSpeed configuration sets {key}. {reason} Leave it out.")
        key = "zero_optimization.stage"
        chosen = resolve(owner, ("zero_stage", stage), (key, value_at(given, key)))
        launched = launch_option("ZERO_STAGE") or "2"
        resolved: Any = chosen if chosen is not None else int(launched) if launched.isdigit() else launched
        if resolved not in get_args(ZeroStage) or isinstance(resolved, bool):
            raise OptionError(f"{owner}(zero_stage={resolved!r}): must be 0, 1, 2 or 3.")
        optimizer = resolve_offload(owner, "offload_optimizer", offload_optimizer, given)
        param = resolve_offload(owner, "offload_param", offload_param, given)
        for name, is_offloaded, smallest in (("optimizer", optimizer, 1), ("param", param, 3)):
            if is_offloaded and resolved < smallest:
                raise OptionError(
                    f"{owner}(zero_offload_{name}=True) with ZeRO {resolved}, which does not partition that. Take "
                    f"zero_stage={smallest} or more."
                )
        return cls(owner, resolved, optimizer, param, given)

    @property
    def has_bf16_weights(self) -> bool:
        """Whether forward passes use bfloat16 copies of the weights, and the optimizer float32 master weights."""
        return value_at(self.given, "bf16.enabled") is True

    def check_agrees(self, *, accumulation: AccumulationSchedule, max_grad_norm: float | None, precision: str) -> None:
        """Raise `OptionError` if the configuration contradicts an option of the trainer."""
        steps, clipping = f"gradient_accumulation_steps={accumulation}", f"max_grad_norm={max_grad_norm}"
        self._check("gradient_accumulation_steps", steps if accumulation.later else accumulation.first, steps)
        self._check("gradient_clipping", max_grad_norm or 0.0, clipping)
        for name in ("bf16", "fp16"):
            if precision != name:
                self._check(f"{name}.enabled", False, f"mixed_precision={precision!r}")
        if precision == "fp16":
            raise OptionError(
                f'{self.owner}(mixed_precision="fp16"): loss scaling is not supported with DeepSpeed. Use "bf16", or '
                "FSDPMixin."
            )
        if self.has_bf16_weights and self.stage < 2:
            raise OptionError(
                f"{self.owner}: the DeepSpeed configuration sets bf16.enabled, which needs zero_stage=2 or 3, with "
                f'stage {self.stage}. Leave it out: mixed_precision="bf16" computes in bfloat16 by itself.'
            )

    def check_batch_size(self, size: int | None, accumulation: AccumulationSchedule, processes: int) -> None:
        """Raise `OptionError` if the configuration has another batch size than `train()` was given."""
        if size is None:
            return
        batches = f"per_device_batch_size={size}"
        self._check("train_micro_batch_size_per_gpu", size, batches)
        total = f"{batches} x {accumulation} batches a step x {processes} processes"
        expected = total if accumulation.later else size * accumulation.first * processes
        self._check("train_batch_size", expected, total)

    def to_deepspeed(self) -> dict[str, Any]:
        """Return the configuration for DeepSpeed. Accumulation, clipping and loss scaling are left to the trainer."""
        config = drop_auto(self.given)
        for key in ("train_batch_size", "fp16"):
            config.pop(key, None)
        zero = config.setdefault("zero_optimization", {})
        zero["stage"] = self.stage
        for key, is_on_host in (("offload_optimizer", self.offload_optimizer), ("offload_param", self.offload_param)):
            zero[key] = (zero.get(key) or {}) | {"device": "cpu" if is_on_host else "none"}
        if self.stage in (1, 2) and not self.offload_optimizer:
            zero.setdefault("compute_grad_norm", False)  # it is not used, and waits for the device
        if self.has_bf16_weights:
            config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        config.setdefault("train_micro_batch_size_per_gpu", 1)  # for DeepSpeed's logs only
        config.setdefault("steps_per_print", sys.maxsize)
        config.setdefault("timers", {}).setdefault("throughput", {"enabled": False})  # it waits for the device
        config.setdefault("zero_force_ds_cpu_optimizer", False)
        return config | {
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "managed_gradient_accumulation": True,
            "zero_allow_untested_optimizer": True,
        }

    def _check(self, key: str, expected: object, option: str) -> None:
        """Raise `OptionError` if the configuration sets a key, but not to what an option of the trainer implies."""
        configured = value_at(self.given, key)
        if configured not in (None, expected):
            raise OptionError(
                f"{self.owner}: the DeepSpeed configuration has {key}={configured}, and the trainer {option}. Set it "
                f'to "{AUTO}", or leave it out.'
            )


# ---- reading


def launch_option(name: str) -> str | None:
    """Return an option of `accelerate launch --use_deepspeed`, which it sets in the environment; None if not given."""
    value = os.environ.get(f"ACCELERATE_DEEPSPEED_{name}")
    return None if value in ("", "none") else value


def read_config(owner: str, config: Mapping[str, object] | str | os.PathLike[str] | None) -> Mapping[str, Any]:
    """Return a configuration, read from its JSON file if it is a path.

    Raises:
        OptionError: The file cannot be read, or does not contain a JSON object.
    """
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return config
    if not isinstance(config, str | os.PathLike):
        raise OptionError(f"{owner}(deepspeed_config={config!r}): must be a mapping, or the path of a JSON file.")
    try:
        read = json.loads(Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"{owner}(deepspeed_config={str(config)!r}) cannot be read: {error}.") from error
    if not isinstance(read, dict):
        raise OptionError(f"{owner}(deepspeed_config={str(config)!r}): the file does not contain a JSON object.")
    return read


def value_at(config: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path; None if it is missing or `"auto"`.

    Example:
        >>> value_at({"zero_optimization": {"stage": 3, "overlap_comm": "auto"}}, "zero_optimization.stage")
        3
    """
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return None if value == AUTO else value


def is_disabled(value: object) -> bool:
    """Return whether a value leaves its feature disabled.

    Example:
        >>> is_disabled({"enabled": False}), is_disabled(True), is_disabled(1)
        (True, False, True)
    """
    return value.get("enabled") is False if isinstance(value, Mapping) else value is not True and value in DISABLED


def drop_auto(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy without `"auto"` values, for which DeepSpeed then takes its defaults.

    Example:
        >>> drop_auto({"zero_optimization": {"stage": 3, "overlap_comm": "auto"}, "train_batch_size": "auto"})
        {'zero_optimization': {'stage': 3}}
    """
    return {
        key: drop_auto(value) if isinstance(value, Mapping) else value for key, value in config.items() if value != AUTO
    }


def resolve(owner: str, option: tuple[str, Any], configured: tuple[str, Any]) -> Any:
    """Return the value of an option or else of the configuration, each given with its name; None if neither is set.

    Raises:
        OptionError: They are set to different values.
    """
    if option[1] is not None and configured[1] is not None and option[1] != configured[1]:
        raise OptionError(
            f"{owner}({option[0]}={option[1]!r}), and the DeepSpeed configuration has {configured[0]}="
            f"{configured[1]!r}. Leave out one of them."
        )
    return configured[1] if option[1] is None else option[1]


def resolve_offload(owner: str, name: str, option: bool | None, given: Mapping[str, Any]) -> bool:
    """Return whether the optimizer or the parameters are kept in host memory.

    Raises:
        OptionError: The device is neither `"cpu"` nor `"none"`, or the option and the configuration contradict.
    """
    key = f"zero_optimization.{name}.device"
    configured, launched = value_at(given, key), launch_option(f"{name.upper()}_DEVICE")
    for device in (configured, launched):
        if device not in OFFLOAD_DEVICES:
            raise OptionError(f'{owner}: {key}={device!r}: must be "cpu" or "none".')
    chosen = resolve(owner, (f"zero_{name}", option), (key, OFFLOAD_DEVICES[configured]))
    return bool(OFFLOAD_DEVICES[launched] if chosen is None else chosen)
