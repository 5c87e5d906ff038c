"""Advice on faster training: `explain()` shows it, and the user decides."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TypeAlias

import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from ptacc.engines.base import OptimizerSlot

FUSED_ON: Mapping[type[Optimizer], tuple[str, ...]] = {
    SGD: ("cpu", "cuda"),
    Adam: ("cpu", "cuda"),
    AdamW: ("cpu", "cuda"),
    Adagrad: ("cpu",),
}
"""The devices for which every supported version of torch has a fused kernel of an optimizer."""
AMPERE = (8, 0)
"""The lowest compute capability of GPUs with TF32."""
Advice: TypeAlias = tuple[str, str]
"""What to write, and its effect."""


def collect_advice(
    model: nn.Module, slots: Collection[OptimizerSlot], device: torch.device, *, precision: str, is_sharded: bool
) -> tuple[Advice, ...]:
    """Return all advice that applies. If `is_sharded`, the engine shards weights or optimizer states over ranks."""
    advice: list[Advice] = []
    if not is_sharded and not has_sparse_gradients(model):
        for slot in slots:
            advice += advise_on_optimizer(slot.optimizer, device, precision)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    advice += advise_on_matmul({p.dtype for p in model.parameters()}, precision, capability)
    return tuple(advice)


def advise_on_optimizer(optimizer: Optimizer, device: torch.device, precision: str = "no") -> Iterator[Advice]:
    """Advise the fused kernel of an optimizer, if it is faster and the user has not chosen a kernel.

    It is the optimizer of a model with dense gradients.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> [code for code, effect in advise_on_optimizer(Adam(net.parameters()), torch.device("cpu"))]
        ['Adam(..., fused=True)']
        >>> list(advise_on_optimizer(Adam(net.parameters(), fused=True), torch.device("cpu")))
        []
    """
    groups = optimizer.param_groups
    kind = type(optimizer)  # subclasses are left out: they may define `step` themselves
    has_fused = device.type in FUSED_ON.get(kind, ())
    has_choice = any(group[name] for group in groups for name in ("foreach", "differentiable") if name in group)
    is_open = has_fused and not has_choice and all(group.get("fused") is None for group in groups)
    # SGD without momentum does too little work for the fused kernel to be faster. With momentum in fp16, the kernel
    # reads uninitialised momentum buffers if the gradient scaler skips the first step.
    is_faster = kind is not SGD or (precision != "fp16" and any(group["momentum"] for group in groups))
    are_floating = all(parameter.is_floating_point() for group in groups for parameter in group["params"])
    if is_open and is_faster and are_floating:
        effect = "one kernel updates all weights, instead of several per weight; results differ by rounding only"
        yield f"{kind.__name__}(..., fused=True)", effect


def has_sparse_gradients(model: nn.Module) -> bool:
    """Return whether a model has embeddings with sparse gradients, which fused kernels do not support."""
    return any(isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse for part in model.modules())


def advise_on_matmul(
    dtypes: Collection[torch.dtype], precision: str, capability: tuple[int, int] | None
) -> Iterator[Advice]:
    """Advise TF32 if the model computes in float32 on a GPU that has it. `capability` is None for other devices.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices

    Example:
        >>> [code for code, effect in advise_on_matmul({torch.float32}, "no", (9, 0))]
        ['torch.set_float32_matmul_precision("high")']
    """
    has_tf32 = capability is not None and capability >= AMPERE
    # The legacy `get_float32_matmul_precision` raises after a setting of this one, which shows both.
    is_full = torch.backends.cuda.matmul.fp32_precision in {"none", "ieee"}
    if has_tf32 and precision == "no" and torch.float32 in dtypes and is_full:
        effect = "float32 matrices are multiplied on tensor cores, with 10 bits of mantissa instead of 23"
        yield 'torch.set_float32_matmul_precision("high")', effect
