"""The engine: what turns a loss into an update. One is made for each run; engine mixins bring their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from ptacc.types.protocols import StateDict


@dataclass(frozen=True)
class OptimizerSlot:
    """One optimizer with the parameters it updates. The core iterates over slots; there is one of them today.

    Args:
        name: What checkpoints and logs call it.
        optimizer: The user's optimizer, never wrapped.
        parameters: The parameters it holds, in its order.
    """

    name: str
    optimizer: Optimizer
    parameters: tuple[Parameter, ...]

    @classmethod
    def create(cls, name: str, optimizer: Optimizer) -> OptimizerSlot:
        """Make the slot of an optimizer."""
        return cls(name, optimizer, tuple(p for group in optimizer.param_groups for p in group["params"]))

    @property
    def learning_rate(self) -> float | Tensor:
        """Learning rate of the first parameter group; a copy, where it is a tensor that will change."""
        rate: float | Tensor = self.optimizer.param_groups[0]["lr"]
        return rate.detach().clone() if isinstance(rate, Tensor) else rate


class Engine(Protocol):
    """What the loop asks of an engine."""

    @property
    def model(self) -> nn.Module:
        """The model as steps call it: on the device, wrapped."""
        ...

    @property
    def slots(self) -> Sequence[OptimizerSlot]:
        """The optimizers."""
        ...

    def around_batch(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Return the context of one batch: gradients are averaged over the processes in the step's last."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`."""
        ...

    def unscale_gradients(self) -> None:
        """Make the gradients what they are without the engine's own scaling."""
        ...

    def clip_norm(self, max_norm: float) -> Tensor:
        """Scale the gradients to a norm of at most `max_norm`, and return the norm they had: a scalar on the device."""
        ...

    def clip_value(self, max_value: float) -> None:
        """Clamp each entry of the gradients to `[-max_value, max_value]`."""
        ...

    def update(self) -> bool:
        """Update the weights and clear the gradients. Return False where the scaler skipped the update."""
        ...

    def sync_buffers(self) -> None:
        """Have the same model on every process, buffers included. A collective: every process makes the same call."""
        ...

    def release(self) -> None:
        """Have the user's model and optimizers as they were, but for their values. A collective, after the run's end.

        After an exception this is not called, since other processes may be elsewhere.
        """
        ...

    def localize(self, value: Any, /) -> Any:
        """Return a value of a saved state as it is here: a tensor that was saved in parts, as this engine holds it."""
        ...

    def weights(self) -> StateDict:
        """Return the model's tensors by their canonical names, whole or dealt. All processes call it.

        Where they are put together for this, rank 0 alone may have them.
        """
        ...

    def load_weights(self, weights: StateDict, /, *, strict: bool = True) -> None:
        """Put such tensors back."""
        ...

    def held_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """Iterate over what this process holds of each parameter, with its name."""
        ...

    def optimizer_states(self) -> Mapping[str, StateDict]:
        """Return the states of the optimizers by their slots' names, but for those that `own_state_dict` has."""
        ...

    def load_optimizer_state(self, name: str, state: StateDict, /) -> None:
        """Put such a state back."""
        ...

    def own_state_dict(self) -> StateDict:
        """Return what this process alone has of the weights' and the optimizers' state, and the others do not."""
        ...

    def load_own_state_dict(self, state_dict: StateDict, /) -> None:
        """Put such a state back, after the weights."""
        ...

    def state_dict(self) -> StateDict:
        """Return the state that is neither the model's nor an optimizer's."""
        ...

    def load_state_dict(self, state_dict: StateDict, /) -> None:
        """Take over a state."""
        ...
