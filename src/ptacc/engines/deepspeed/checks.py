"""Checks, before a model is partitioned, for what DeepSpeed cannot run or would compute wrongly without an error."""

from __future__ import annotations

import os
import subprocess

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from ptacc.engines.base import OptimizerSlot
from ptacc.engines.common import has_own_zero_grad
from ptacc.engines.deepspeed.config import ZeroConfig, value_at
from ptacc.errors import LaunchError, ModelError
from ptacc.model.optimizer_modes import HasModes

ELEMENTWISE = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Rprop", "ASGD", "Adadelta")
"""Optimizers of torch that update each entry independently. ZeRO's partitions do not end where parameters end."""
BUILD_ERRORS = (RuntimeError, OSError, ImportError, subprocess.SubprocessError)
"""Raised if DeepSpeed cannot compile its extensions."""


def init_distributed(device: torch.device) -> None:
    """Initialise DeepSpeed with the launch's process group.

    Raises:
        LaunchError: DeepSpeed uses another device, or cannot compile its extensions.
    """
    used = get_accelerator().device_name(None)
    if used != device.type:
        raise LaunchError(
            f"DeepSpeed computes on {used}, and this launch on {device.type}. Set DS_ACCELERATOR={device.type} in "
            "the environment."
        )
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False)
    except BUILD_ERRORS as error:
        raise LaunchError(
            f"DeepSpeed does not start: {str(error).strip().splitlines()[0]} On a CPU it first compiles a part of "
            "itself: install ninja (`pip install ninja`) and a C++ compiler."
        ) from error
    if "LOCAL_WORLD_SIZE" in os.environ:
        # DeepSpeed's launcher sets it. Without it, ZeRO 3 on a CPU starts numactl in each step. It is set after
        # initialisation: set before, ranks would reduce over shared memory, where a rank that waits for a dead one
        # waits forever, and the memory stays allocated after the processes have ended.
        os.environ.setdefault("LOCAL_SIZE", os.environ["LOCAL_WORLD_SIZE"])


def check_model(model: nn.Module, config: ZeroConfig) -> None:
    """Raise `ModelError` for weights that are partitioned already, or not in float32."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ModelError(
                f"{config.owner}: {name} is partitioned already: by deepspeed.zero.Init(), or by a run that ended "
                "with an exception. Create the model again, without zero.Init(): the run partitions it at its start."
            )
        if parameter.dtype != torch.float32:
            raise ModelError(
                f"{config.owner}: {name} is {str(parameter.dtype).removeprefix('torch.')}, and DeepSpeed updates "
                'weights in float32. Call model.float(); mixed_precision="bf16" computes in bfloat16.'
            )


def check_optimizer(slot: OptimizerSlot, config: ZeroConfig) -> None:
    """Raise `ModelError` for an optimizer that DeepSpeed would not use as it is meant."""
    if slot.outside:
        raise ModelError(
            f"{config.owner}: the optimizer has parameters of {', '.join(slot.outside)}, and DeepSpeed trains those of "
            "the model only. Make that module a submodule of the model, or train without DeepSpeed."
        )
    optimizer = slot.optimizer
    if has_own_zero_grad(optimizer):
        raise ModelError(
            f"{config.owner}: {type(optimizer).__name__} has a zero_grad of its own, and DeepSpeed clears gradients "
            "itself. Leave it out, or train without DeepSpeed."
        )
    if isinstance(optimizer, HasModes):
        raise ModelError(
            f"{config.owner}: {type(optimizer).__name__} has a train mode and an eval mode, which it cannot set on the "
            "partitions of a model. Train without DeepSpeed, or with an optimizer without modes."
        )
    kind = type(optimizer)
    is_known = kind.__module__.startswith("torch.optim") and kind.__name__ in ELEMENTWISE
    if config.stage > 0 and not is_known and value_at(config.given, "zero_allow_untested_optimizer") is not True:
        raise ModelError(
            f"{config.owner}: {kind.__name__} under ZeRO {config.stage} may need full parameters, and would get flat "
            f"partitions of them. Use an optimizer that updates each entry independently ({', '.join(ELEMENTWISE)}), "
            "or zero_stage=0. If yours does, set zero_allow_untested_optimizer in deepspeed_config."
        )
