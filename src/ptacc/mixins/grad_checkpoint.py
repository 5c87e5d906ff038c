"""Gradient checkpointing."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from ptacc.core.hooks import Mixin
from ptacc.model.caching import caches_disabled
from ptacc.model.norms import CopiedStatistics
from ptacc.model.patching import Forward, patched_forwards
from ptacc.model.selection import check_selectors, select_submodules


class GradCheckpointMixin(Mixin):
    """Recomputes the activations of selected submodules in the backward pass instead of storing them.

    This saves memory and takes time; losses and weights are equal to the bit. Only the inputs of a selected submodule
    are stored, and its forward runs twice. Select large submodules, such as the blocks of a network, each of whose
    activations fit in memory. Dropout draws the same mask both times, and the running statistics of norm layers are
    updated once. Other buffers that the forward updates are updated twice. A model of transformers that keeps keys and
    values in a cache would do so twice too: its `config.use_cache` is False during the run.

    Options:
        gradient_checkpointing: Classes of submodules, or names as in `named_modules()` with `*` as a wildcard.
            Submodules within a selected one are not selected again.

    Hooks: `around_run`.

    Combines with: everything; with `CompileMixin`, select submodules without batch norm.

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
        check_selectors(type(self).__name__, "gradient_checkpointing", self.gradient_checkpointing)

    @override
    @contextlib.contextmanager
    def around_run(self) -> Generator[None]:
        # Patched after the other mixins, so that the recomputation includes their patches.
        with super().around_run():
            option = f"{type(self).__name__}(gradient_checkpointing=[...])"
            selected = select_submodules(self.unwrapped_model, self.gradient_checkpointing, option)
            without_cache = caches_disabled(self.unwrapped_model) if selected else contextlib.nullcontext()
            with without_cache, patched_forwards(selected, checkpointed_forward):
                yield


def checkpointed_forward(module: nn.Module, forward: Forward) -> Forward:
    """Return a forward that stores only its inputs in training."""
    norms = [part for part in module.modules() if isinstance(part, _NormBase)]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return contextlib.nullcontext(), CopiedStatistics(norms)

    # Compiled code accepts only torch's own contexts, and only as the default.
    options: dict[str, Any] = {"context_fn": contexts} if norms else {}

    def call(*args: Any, **kwargs: Any) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)

        names, num_args = list(kwargs), len(args)

        def call_by_position(*values: Any) -> Any:
            return forward(*values[:num_args], **dict(zip(names, values[num_args:], strict=True)))

        # torch preserves the random states of the devices of positional tensors only.
        return checkpoint(call_by_position, *args, *kwargs.values(), use_reentrant=False, **options)

    return call
