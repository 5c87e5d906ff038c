"""Gradient checkpointing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint, noop_context_fn
from typing_extensions import override

from ptacc.core.hooks import Mixin
from ptacc.core.options import closest, value_text
from ptacc.core.patches import Forward, patched_forwards
from ptacc.errors import ModelError, OptionError

Choice: TypeAlias = type[nn.Module] | str
SHOWN = 10
"""Names that an error shows at most."""


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
        owner = type(self).__name__
        choices: object = self.gradient_checkpointing
        if isinstance(choices, str | type) or not isinstance(choices, Sequence):
            raise OptionError(
                f"{owner}(gradient_checkpointing={value_text(choices)}): must be a list of classes and names. Write "
                "`gradient_checkpointing=[...]`, also for a single one."
            )
        for choice in choices:
            if not isinstance(choice, str) and not (isinstance(choice, type) and issubclass(choice, nn.Module)):
                raise OptionError(
                    f"{owner}(gradient_checkpointing=[...]): {value_text(choice)} is neither a class of modules nor a "
                    "name. Give the class itself, or the name of a submodule as in model.named_modules()."
                )

    @override
    @contextlib.contextmanager
    def around_run(self) -> Iterator[None]:
        """Patch the chosen submodules."""
        # After the other mixins have patched: what is computed anew is what was computed first.
        with super().around_run():
            chosen = chosen_submodules(self.unwrapped_model, self.gradient_checkpointing, type(self).__name__)
            with patched_forwards(chosen, checkpointed):
                yield


def chosen_submodules(model: nn.Module, choices: Sequence[Choice], owner: str) -> list[nn.Module]:
    """Return the outermost submodules that are chosen.

    Lists of modules are passed over: they are never called, only what is in them.

    Raises:
        ModelError: A choice that no submodule matches.
    """
    submodules = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and type(module).forward is not nn.Module.forward
    }
    chosen: set[str] = set()
    for choice in choices:
        found = {name for name, module in submodules.items() if is_match(choice, name, module)}
        if not found:
            raise ModelError(f"{owner}(gradient_checkpointing=[...]): {unmatched(choice, model, submodules)}")
        chosen |= found
    outermost = (name for name in submodules if name in chosen and chosen.isdisjoint(parents_of(name)))
    return list(dict.fromkeys(submodules[name] for name in outermost))  # one module may have several names


def is_match(choice: Choice, name: str, module: nn.Module) -> bool:
    """Say whether a submodule is meant by a choice."""
    return fnmatchcase(name, choice) if isinstance(choice, str) else isinstance(module, choice)


def parents_of(name: str) -> list[str]:
    """Return the names of the modules around a submodule.

    Example:
        >>> parents_of("encoder.layers.0")
        ['encoder', 'encoder.layers']
    """
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def unmatched(choice: Choice, model: nn.Module, submodules: dict[str, nn.Module]) -> str:
    """Say that no submodule matches a choice, and what there is."""
    by_name = isinstance(choice, str)
    asked = repr(choice) if isinstance(choice, str) else choice.__name__
    known = list(submodules) if by_name else sorted({type(module).__name__ for module in submodules.values()})
    hint = closest(choice if isinstance(choice, str) else choice.__name__, known)
    shown = ", ".join(known[:SHOWN]) + (", ..." if len(known) > SHOWN else "")
    return (
        f"{type(model).__name__} calls no submodule that {'has the name' if by_name else 'is a'} {asked}. {hint}"
        f"There are: {shown or 'none at all'}."
    )


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
