"""Gradient checkpointing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint, noop_context_fn
from typing_extensions import override

from ptacc.core.hooks import Mixin
from ptacc.model.patching import Forward, patched_forwards
from ptacc.model.selection import check_selectors, select_submodules


class GradCheckpointMixin(Mixin):
    """Computes the activations of chosen submodules anew in the backward pass, instead of keeping them.

    Less memory, more time, and the same losses and weights to the last bit. Of a chosen submodule only the inputs are
    kept, and its forward runs twice: choose large ones whose activations fit in memory by themselves, such as the
    blocks of a network. Dropout draws the same in both, and running statistics move once. Other buffers that a forward
    changes would be changed twice.

    Options:
        gradient_checkpointing: Classes of submodules, or their names as in `named_modules()`, in which `*` stands for
            anything. What lies in a chosen submodule is not chosen again.

    Hooks: `around_run`.

    Combines with: everything.

    Source: Chen et al., 2016, https://arxiv.org/abs/1604.06174

    Example:
        >>> from collections.abc import Sequence
        >>> from torch import nn
        >>> from ptacc import GradCheckpointMixin, Trainer
        >>> class MyTrainer(GradCheckpointMixin, Trainer):
        ...     gradient_checkpointing: Sequence[type[nn.Module] | str] = ("encoder.layers.*",)
    """

    gradient_checkpointing: Sequence[type[nn.Module] | str] = ()

    @override
    def check_options(self) -> None:
        """Refuse what is no list of classes and names."""
        check_selectors(type(self).__name__, "gradient_checkpointing", self.gradient_checkpointing)

    @override
    @contextlib.contextmanager
    def around_run(self) -> Iterator[None]:
        """Patch the chosen submodules."""
        # After the other mixins have patched: what is computed anew is what was computed first.
        with super().around_run():
            option = f"{type(self).__name__}(gradient_checkpointing=[...])"
            chosen = select_submodules(self.unwrapped_model, self.gradient_checkpointing, option)
            with patched_forwards(chosen, checkpointed):
                yield


# ---- one module


def checkpointed(module: nn.Module, forward: Forward) -> Forward:
    """Return a forward that keeps its inputs alone, where there will be a backward pass in training."""
    norms = [part for part in module.modules() if isinstance(part, _NormBase)]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return contextlib.nullcontext(), KeptStatistics(norms)

    # Compiled code takes no other contexts than torch's own.
    context_fn = contexts if norms else noop_context_fn

    def call(*args: Any, **kwargs: Any) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)

        names, split = list(kwargs), len(args)

        def positional(*values: Any) -> Any:
            return forward(*values[:split], **dict(zip(names, values[split:], strict=True)))

        # By position, since the devices whose random streams are preserved are those of positional tensors.
        return checkpoint(positional, *args, *kwargs.values(), use_reentrant=False, context_fn=context_fn)

    return call


class KeptStatistics(AbstractContextManager[None]):
    """Has norms move copies of their running statistics in the block, which can be entered again.

    Copies, since writing the values back would count as a change of tensors that a graph may hold.
    """

    def __init__(self, norms: Sequence[_NormBase]) -> None:
        """Keep the statistics of `norms`."""
        self._norms = norms
        self._kept: list[list[dict[str, Tensor]]] = []

    @override
    def __enter__(self) -> None:
        """Put copies in their place."""
        self._kept.append([dict(norm.named_buffers(recurse=False)) for norm in self._norms])
        for norm, buffers in zip(self._norms, self._kept[-1], strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer.clone())

    @override
    def __exit__(self, *_: object) -> None:
        """Put them back."""
        for norm, buffers in zip(self._norms, self._kept.pop(), strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)
