"""Freezing by name: which parameters and norm layers are frozen, and when they are trained."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _NormBase

from ptacc.errors import ModelError, OptionError
from ptacc.model.selection import list_parents
from ptacc.model.state_dict import canonical_name
from ptacc.types.progress import Epochs, Progress, Steps
from ptacc.validation import did_you_mean, list_some, value_text

UnfreezeTime: TypeAlias = Epochs | Steps
"""The number of complete epochs, or of steps, after which a parameter is trained."""
ONE_EPOCH = Epochs(1)


def gradual_unfreezing(blocks: Iterable[str], every: UnfreezeTime = ONE_EPOCH) -> dict[str, UnfreezeTime]:
    """Return a value of `unfreeze_at` that unfreezes blocks one after another, the last one first.

    Args:
        blocks: Names or patterns of the blocks, in the order of the model.
        every: The time between two blocks. The last block is trained after this time.

    Source: Howard and Ruder, 2018, https://arxiv.org/abs/1801.06146

    Example:
        >>> gradual_unfreezing(["embedding", "layers.0", "layers.1"])
        {'layers.1': Epochs(n=1), 'layers.0': Epochs(n=2), 'embedding': Epochs(n=3)}
    """
    return {block: type(every)(every.n * number) for number, block in enumerate(reversed(list(blocks)), start=1)}


class Freezing:
    """The parameters and the norm layers of a model that are frozen by name, with the times when they are unfrozen.

    A parameter with several times is unfrozen at the first of them, and one without a time never. A batch norm whose
    parameters are all named is in eval mode while all of them are frozen. Then it returns to the mode that it had when
    this object was created. One without parameters counts by its own name.
    """

    def __init__(
        self, model: nn.Module, frozen: Collection[str], unfreeze_at: Mapping[str, UnfreezeTime], owner: str
    ) -> None:
        """Find what is named.

        Args:
            model: The model.
            frozen: Names of parameters and submodules that are frozen. `*` stands for any characters.
            unfreeze_at: Such names, of what is frozen until a time.
            owner: The name of the trainer, for error messages.

        Raises:
            ModelError: No parameter has a name.
        """
        named = {canonical_name(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
        for option, patterns in (("frozen", frozen), ("unfreeze_at", unfreeze_at)):
            check_patterns(type(model).__name__, named, patterns, f"{owner}({option}=...)")
        self._times: dict[Parameter, list[UnfreezeTime]] = {}
        for name, parameter in named.items():
            if (times := find_times(name, frozen, unfreeze_at)) is not None:
                self._times.setdefault(parameter, []).extend(times)
        self._norms: dict[_NormBase, list[list[UnfreezeTime]]] = {}
        for name, module in model.named_modules():
            if isinstance(module, _NormBase):
                members = [f"{name}.{leaf}" for leaf, _ in module.named_parameters()] or [name]
                found = [find_times(canonical_name(member), frozen, unfreeze_at) for member in members]
                if all(times is not None for times in found):
                    self._norms[module] = [times for times in found if times is not None]
        self._modes = {norm: norm.training for norm in self._norms}
        self._in_eval: set[_NormBase] = set()

    @property
    def unfrozen_later(self) -> list[Parameter]:
        """The parameters that are unfrozen at some time."""
        return [parameter for parameter, times in self._times.items() if times]

    @property
    def steps(self) -> frozenset[int]:
        """The numbers of steps after which parameters are unfrozen."""
        return frozenset(time.n for times in self._times.values() for time in times if isinstance(time, Steps))

    def apply(self, progress: Progress) -> None:
        """Freeze and unfreeze parameters and norm layers."""
        self.set_frozen(progress)
        self.set_modes(progress)

    @contextlib.contextmanager
    def applied_at_start(self) -> Generator[None]:
        """Freeze parameters and norm layers as at the start of a run for the block, and restore them after it."""
        before = [(parameter, parameter.requires_grad) for parameter in self._times]
        try:
            self.apply(Progress())
            yield
        finally:
            for parameter, requires_grad in before:
                parameter.requires_grad_(requires_grad)
            for norm, mode in self._modes.items():
                norm.train(mode)

    def set_frozen(self, progress: Progress) -> None:
        """Freeze and unfreeze the parameters, as the progress of a run requires."""
        for parameter, times in self._times.items():
            parameter.requires_grad_(is_unfrozen(times, progress))

    def set_modes(self, progress: Progress) -> None:
        """Put frozen norm layers into eval mode, and those that are no longer frozen back into their own."""
        for norm, members in self._norms.items():
            if not any(is_unfrozen(times, progress) for times in members):
                norm.eval()
                self._in_eval.add(norm)
            elif norm in self._in_eval:
                norm.train(self._modes[norm])
                self._in_eval.discard(norm)


def is_unfrozen(times: Collection[UnfreezeTime], progress: Progress) -> bool:
    """Return whether one of the times has come.

    Example:
        >>> is_unfrozen([Epochs(2)], Progress(steps=9, epochs=1)), is_unfrozen([Steps(9)], Progress(steps=9))
        (False, True)
    """
    return any(time.is_reached(progress) for time in times)


def find_times(
    name: str, frozen: Collection[str], unfreeze_at: Mapping[str, UnfreezeTime]
) -> list[UnfreezeTime] | None:
    """Return the times at which a parameter or a module is unfrozen; None if it is not frozen by name."""
    times = [time for pattern, time in unfreeze_at.items() if is_named(name, pattern)]
    return times if times or any(is_named(name, pattern) for pattern in frozen) else None


def is_named(name: str, pattern: str) -> bool:
    """Return whether a pattern has the name of a parameter or a module, or of a module that contains it."""
    return any(fnmatchcase(part, pattern) for part in (name, *list_parents(name)))


def check_patterns(model: str, names: Collection[str], patterns: Collection[str], option: str) -> None:
    """Raise `ModelError` for a pattern that names none of a model's parameters."""
    for pattern in patterns:
        if not any(is_named(name, pattern) for name in names):
            known = list(dict.fromkeys(part for name in names for part in (*list_parents(name), name)))
            raise ModelError(
                f"{option}: {pattern!r} names no parameter of {model}, and no submodule with parameters. "
                f"{did_you_mean(pattern, known)}There are: {list_some(known, most=10) or 'none at all'}."
            )


def check_freeze_options(owner: str, frozen: object, unfreeze_at: object) -> None:
    """Raise `OptionError` unless there is a list of names, and a mapping of names to times."""
    if isinstance(frozen, str) or not isinstance(frozen, Sequence) or not all(isinstance(name, str) for name in frozen):
        raise OptionError(
            f"{owner}(frozen={value_text(frozen)}): must be a list of names of parameters or submodules. Write "
            '`frozen=["encoder.*"]`, also for a single one.'
        )
    times = unfreeze_at.items() if isinstance(unfreeze_at, Mapping) else [(unfreeze_at, None)]
    for name, time in times:
        if not isinstance(name, str) or not isinstance(time, Epochs | Steps):
            raise OptionError(
                f"{owner}(unfreeze_at={value_text(unfreeze_at)}): must be a mapping of names to `Epochs` or `Steps`. "
                'Write `unfreeze_at={"encoder.*": Epochs(2)}`.'
            )
