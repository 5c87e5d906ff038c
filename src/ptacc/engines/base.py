"""The protocol of engines: an engine wraps the model for a run and turns losses into optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from operator import itemgetter
from types import NoneType
from typing import ClassVar, Protocol, TypeAlias

from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from ptacc.model.joined_modules import join_modules
from ptacc.model.optimizer_state import group_names, own_values
from ptacc.types.protocols import StateDict

Closure: TypeAlias = Callable[[], Tensor]
"""Computes the gradients of a step again, at the present weights, and returns the loss: a scalar on the device."""


@dataclass(frozen=True)
class OptimizerSlot:
    """One optimizer with the parameters it updates.

    Args:
        name: Its name in checkpoints: `"optimizer"`, or `"optimizer.<label>"` for one of several.
        optimizer: The user's optimizer, never wrapped.
        outside: The modules outside of the model of which the optimizer has parameters, such as a loss, by their places
            among the trainer's options.
    """

    name: str
    optimizer: Optimizer
    outside: Mapping[str, nn.Module] = field(default_factory=dict, compare=False)

    @property
    def label(self) -> str:
        """Its name in an `OptimizerDict`, or `"optimizer"`."""
        return self.name.removeprefix("optimizer.")

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The parameters that all groups of the optimizer have at present, in order."""
        return tuple(p for group in self.optimizer.param_groups for p in group["params"])

    def settings(self, model: nn.Module) -> Iterator[tuple[str, str]]:
        """Iterate over the settings of the parameter groups, such as `lr`: the name, and the values by group.

        The groups are in the order of the names of their parameters, which does not depend on the optimizer's.
        """
        joined = join_modules(model, self.outside)
        names = [min(names, default="") for names in group_names(joined, self.optimizer)]
        ordered = sorted(zip(names, self.optimizer.param_groups, strict=True), key=itemgetter(0))
        groups = [group for _, group in ordered]
        for name in sorted(
            {name for group in groups for name in group} - {"params", "initial_lr"} - own_values(self.optimizer)
        ):
            values = [value.tolist() if isinstance(value := group.get(name), Tensor) else value for group in groups]
            if all(isinstance(value, int | float | str | tuple | NoneType) for value in values):
                yield name, repr(values[0]) if all(value == values[0] for value in values) else repr(values)

    @property
    def learning_rate(self) -> float | Tensor:
        """Learning rate of the first parameter group, NaN if it has none."""
        return copy_rate(self.optimizer.param_groups[0].get("lr"))


def learning_rates(slots: Sequence[OptimizerSlot]) -> dict[str, float | Tensor]:
    """Return the learning rates of all parameter groups by name, unless there is one group only.

    Names are `<optimizer>/learning_rate`, without the optimizer if it is the only one, and `<optimizer>/<group>/...` if
    the optimizer has several groups. A group's name is its entry `"name"`, or its number.
    """
    if len(slots) == 1 and len(slots[0].optimizer.param_groups) == 1:
        return {}
    rates: dict[str, float | Tensor] = {}
    for slot in slots:
        prefix, groups = f"{slot.label}/" if len(slots) > 1 else "", slot.optimizer.param_groups
        for number, group in enumerate(groups):
            name = f"{prefix}{group.get('name', number)}/" if len(groups) > 1 else prefix
            rates[f"{name}learning_rate"] = copy_rate(group.get("lr"))
    return rates


def copy_rate(rate: float | Tensor | None) -> float | Tensor:
    """Return a learning rate; a tensor is copied, since schedulers change it in place.

    An optimizer that computes its own step sizes may have none, as Adafactor of Transformers. It is NaN.
    """
    if rate is None:
        return math.nan
    return rate.detach().clone() if isinstance(rate, Tensor) else rate


def join_trained(model: nn.Module, slots: Iterable[OptimizerSlot]) -> nn.Module:
    """Return a model, joined with the modules outside of it that the optimizers train; itself if there are none."""
    return join_modules(model, {place: module for slot in slots for place, module in slot.outside.items()})


def all_parameters(slots: Iterable[OptimizerSlot]) -> list[Parameter]:
    """Return the parameters that the optimizers have at present, in order."""
    return [parameter for slot in slots for parameter in slot.parameters]


@dataclass(frozen=True)
class EngineState:
    """The state of an engine, as checkpoints hold it. Tensors are references; saving copies them.

    Args:
        weights: The model's `state_dict()`, by the names it has without `torch.compile`. An engine that has to gather
            the weights returns them on rank 0, and on other ranks zeros that are expanded to the same shape.
        optimizers: The state of each optimizer by its slot's name; without those whose state is in `own`.
        shared: Further state that is equal on all ranks, such as that of a gradient scaler.
        own: State of this rank alone. It is empty when a run resumes with another number of ranks.
    """

    weights: StateDict
    optimizers: Mapping[str, StateDict] = field(default_factory=dict)
    shared: StateDict = field(default_factory=dict)
    own: StateDict = field(default_factory=dict)


class Engine(Protocol):
    """Wraps the model for one run and steps its optimizers. A trainer's `make_engine` returns a new one for each run.

    One step calls, on every rank:

    ```
    for each batch:  with engine.around_batch(is_last=...):  loss = f(engine.model); engine.backward(loss)
    then:            engine.unscale_gradients(); clip_norm() or clip_value(), if asked for; engine.update()
    ```

    After the last step follows `release()`, and `close()` in any case.

    Attributes:
        can_update_separately: Whether the engine has `updating`.
        can_unfreeze: Whether it trains parameters that require no gradient at first, and do so later.
    """

    can_update_separately: ClassVar[bool]
    can_unfreeze: ClassVar[bool]

    @property
    def can_step_by_closure(self) -> bool:
        """Whether `update` takes a closure."""
        ...

    @property
    def model(self) -> nn.Module:
        """The model that steps call: on the device, and wrapped if the engine wraps it."""
        ...

    @property
    def slots(self) -> Sequence[OptimizerSlot]:
        """The optimizers, with the parameters that they update during the run."""
        ...

    def updating(self, slot: OptimizerSlot) -> AbstractContextManager[None]:
        """Return a context in which backward passes, clipping and updates are those of one optimizer."""
        ...

    def around_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Return a context for the forward and backward pass of one batch.

        Args:
            is_last: Whether it is the last batch of its step. Gradients are averaged over ranks in that batch only.
        """
        ...

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass: add the gradients of `loss` (a scalar, scaled for the step) to those of the step."""
        ...

    def stop_overlapping(self) -> None:
        """Send no gradients during backward passes from here on, which have collectives of their own.

        Ranks could reach the two in another order, if a parameter has no gradient on some of them.
        """
        ...

    def unscale_gradients(self) -> None:
        """Remove the engine's own scaling, such as a gradient scaler's, from the gradients of the step."""
        ...

    def clip_norm(self, max_norm: float | Tensor) -> Tensor:
        """Scale the gradients to a global norm of at most `max_norm`: a number, or a scalar on the device.

        Returns:
            The norm before clipping: a scalar on the device, equal on all ranks.
        """
        ...

    def clip_value(self, max_value: float) -> None:
        """Clamp each entry of the gradients to `[-max_value, max_value]`."""
        ...

    def update(self, closure: Closure | None = None) -> bool:
        """Step the optimizers and clear the gradients.

        Args:
            closure: What to pass to the `step` of the optimizer, if `can_step_by_closure`. The loss that it returns is
                this rank's; the optimizer gets the mean over the ranks.

        Returns:
            False if the step was skipped because the gradients overflowed. Skipped steps are not counted.
        """
        ...

    def release(self) -> None:
        """Restore the user's model and optimizers, which keep their trained values. A collective.

        It is called at the end of a run, and not after an exception, since other ranks may not reach the call.
        """
        ...

    def close(self) -> None:
        """Remove what the engine added to the user's parameters. Called after an exception, too; not a collective."""
        ...

    def get_state(self) -> EngineState:
        """Return the state to save. A collective if weights have to be gathered."""
        ...

    def load_state(self, state: EngineState, /) -> None:
        """Load a state that `get_state` of the same engine returned, in another process if need be. A collective.

        The trainer has compared names and shapes of the weights before. What a user chose to ignore may be missing:
        weights, or the state of an optimizer; the present values then stay.
        """
        ...
