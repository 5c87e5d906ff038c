"""Several optimizers of one trainer, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, overload

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from ptacc.errors import OptionError


class OptimizerDict(Optimizer):
    """Optimizers by name, as one: `OptimizerDict({"muon": Muon(...), "adamw": AdamW(...)})`.

    A loop with one update per step steps all of them. `MultiUpdateLoop` steps the one that an update names. Each has
    its own parameter groups, state and schedule.

    Args:
        optimizers: The optimizers by name. Each name is a Python identifier.

    Raises:
        OptionError: There are none, a name is not an identifier, or a parameter is in several of them.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> decayed = torch.optim.AdamW([model.weight], lr=0.1)
        >>> optimizers = OptimizerDict({"weight": decayed, "bias": torch.optim.SGD([model.bias], lr=0.2)})
        >>> [group["lr"] for group in optimizers.param_groups], optimizers["weight"] is decayed
        ([0.1, 0.2], True)
    """

    def __init__(self, optimizers: Mapping[str, Optimizer]) -> None:  # torch's own would make parameter groups
        if not optimizers or not all(isinstance(optimizer, Optimizer) for optimizer in optimizers.values()):
            raise OptionError(f"OptimizerDict({optimizers!r}): must be optimizers by name, at least one.")
        if invalid := [name for name in optimizers if not name.isidentifier()]:
            raise OptionError(f"OptimizerDict: the name {invalid[0]!r} must be a Python identifier.")
        self._optimizers = dict(optimizers)
        self.defaults: dict[str, Any] = {}
        owners: dict[Tensor, str] = {}
        for name, optimizer in self.items():
            for parameter in chain.from_iterable(group["params"] for group in optimizer.param_groups):
                if owners.setdefault(parameter, name) != name:
                    raise OptionError(
                        f"OptimizerDict: a parameter of shape {tuple(parameter.shape)} is in {owners[parameter]!r} and "
                        f"in {name!r}. Give each parameter to one optimizer."
                    )

    @override
    def __reduce__(self) -> tuple[type[OptimizerDict], tuple[dict[str, Optimizer]]]:
        return OptimizerDict, (self._optimizers,)  # torch's own state of an optimizer lacks the names

    def __getitem__(self, name: str) -> Optimizer:
        return self._optimizers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._optimizers)

    def __len__(self) -> int:
        return len(self._optimizers)

    def items(self) -> Iterator[tuple[str, Optimizer]]:
        """Iterate over the names and the optimizers."""
        yield from self._optimizers.items()

    @property
    @override
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]  # read-only
        """The parameter groups of all optimizers."""
        return [group for optimizer in self._optimizers.values() for group in optimizer.param_groups]

    @property
    @override
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        """The states of all parameters."""
        return dict(chain.from_iterable(optimizer.state.items() for optimizer in self._optimizers.values()))

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise OptionError("OptimizerDict.add_param_group: add the group to one of the optimizers, by its name.")

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self._optimizers.values():
            optimizer.zero_grad(set_to_none)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @override
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        if closure is not None:
            raise OptionError("OptimizerDict.step: several optimizers cannot share a closure.")
        for optimizer in self._optimizers.values():
            optimizer.step()
        return None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {name: optimizer.state_dict() for name, optimizer in self.items()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, optimizer in self.items():
            optimizer.load_state_dict(state_dict[name])
