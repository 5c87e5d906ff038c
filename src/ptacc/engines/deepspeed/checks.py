"""What DeepSpeed cannot run, or would run wrong in silence: it is looked for before a model is dealt out."""

from __future__ import annotations

import os
import subprocess

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.optim import Optimizer

from ptacc.engines.deepspeed.config import ZeroConfig, value_at
from ptacc.errors import LaunchError, ModelError

ELEMENTWISE = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Rprop", "ASGD", "Adadelta")
"""torch's optimizers that treat each entry by itself: parts are cut across the borders of parameters."""
BUILD_ERRORS = (RuntimeError, OSError, ImportError, subprocess.SubprocessError)
"""What is raised where DeepSpeed cannot compile what it needs."""


def init_distributed(device: torch.device) -> None:
    """Let DeepSpeed use the launch's own process group.

    Raises:
        LaunchError: It computes on another device, or cannot compile what it needs.
    """
    theirs = get_accelerator().device_name(None)
    if theirs != device.type:
        raise LaunchError(
            f"DeepSpeed computes on {theirs}, and this launch on {device.type}. Set DS_ACCELERATOR={device.type} in "
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
        # As DeepSpeed's own launcher says it, or on a CPU ZeRO 3 would start numactl at each step to ask it. Said
        # before, processes would sum over memory that they share: who waits there for one that is gone waits for good,
        # and the system keeps that memory after their end.
        os.environ.setdefault("LOCAL_SIZE", os.environ["LOCAL_WORLD_SIZE"])


def check_model(model: nn.Module, config: ZeroConfig) -> None:
    """Raise `ModelError` for weights that DeepSpeed would make others of, or has already."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ModelError(
                f"{config.owner}: {name} is in parts already: from deepspeed.zero.Init(), or left so by a run that an "
                "exception ended. Make the model anew, and whole: it is dealt out at the start of the run."
            )
        if parameter.dtype != torch.float32:
            raise ModelError(
                f"{config.owner}: {name} is {str(parameter.dtype).removeprefix('torch.')}, and DeepSpeed updates "
                'weights in float32. Call model.float(); mixed_precision="bf16" computes in less.'
            )


def check_optimizer(optimizer: Optimizer, config: ZeroConfig) -> None:
    """Raise `ModelError` for an optimizer that would compute something else on parts of parameters, in silence."""
    kind = type(optimizer)
    is_known = kind.__module__.startswith("torch.optim") and kind.__name__ in ELEMENTWISE
    if config.stage > 0 and not is_known and value_at(config.given, "zero_allow_untested_optimizer") is not True:
        raise ModelError(
            f"{config.owner}: {kind.__name__} under ZeRO {config.stage} may look at whole parameters, and would get "
            f"flat parts of them. Take one that treats each entry by itself ({', '.join(ELEMENTWISE)}), or "
            "zero_stage=0. If yours does, say zero_allow_untested_optimizer in deepspeed_config."
        )
