"""ZeRO: where DeepSpeed has weights, gradients and the optimizer's state, and how they are reached there.

```
stage   weights                   gradients              the optimizer works on
0       whole                     whole                  the user's parameters
1, 2    whole                     flat, a part of each   a flat part of each group's parameters, joined
3       a flat part of each       a flat part of each    those parts, joined
```

What is done to an optimizer's state here holds for those that treat each entry by itself.
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.nn import Parameter
from typing_extensions import override

from ptacc.engines.base import OptimizerSlot

State = dict[str, Any]
"""What an optimizer keeps of one parameter."""


class Zero(ABC):
    """One stage of ZeRO.

    Args:
        engine: DeepSpeed's.
        slot: The user's optimizer, and the parameters that it had before.
        groups: Those parameters, by the optimizer's groups.
    """

    deals_gradients: bool = True
    """Whether each process has other gradients."""

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, slot: OptimizerSlot, groups: Sequence[Sequence[Parameter]]
    ) -> None:
        self.engine, self.optimizer, self.groups = engine, slot.optimizer, groups
        self.trained = [parameter for parameter in slot.parameters if parameter.requires_grad]
        self._trained_ids = frozenset(map(id, self.trained))
        self.inner: Any = engine.optimizer
        """DeepSpeed's wrapper of the optimizer, of which no type tells."""

    def begin(self, model: nn.Module) -> None:
        """Make the engine ready, before the first step."""

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """Return what this process has of the gradients; what is changed in it is to be given to `set_gradients`."""

    def set_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Let the update be made from changed gradients."""

    def held(self, parameter: Parameter) -> Tensor:
        """Return what this process has of the weights that forward passes use."""
        return parameter.detach()

    def whole(self, parameter: Parameter) -> Tensor:
        """Return a whole weight, as it is updated. A collective, where that is not the one of forward passes."""
        return parameter.detach()

    @abstractmethod
    def set_weights(self, weights: Mapping[Parameter, Tensor]) -> None:
        """Put whole weights, which every process has, in the place of the present ones. A collective."""

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Surround an update."""
        yield

    def has_masters(self, parameter: Parameter) -> bool:
        """Whether forward passes use a copy of a weight in less precision than it is updated in."""
        return id(parameter) in self._trained_ids and parameter.dtype != torch.float32

    # ---- the optimizer's state

    def take_states(self, original_device: Callable[[Parameter], torch.device]) -> dict[Tensor, State]:
        """Return the optimizer's state by the user's parameters, whole. A collective: one tensor at a time.

        Args:
            original_device: Returns the device where the state of a parameter is to be.
        """
        return dict(self.optimizer.state)

    def give_states(self, states: Mapping[Tensor, State]) -> None:
        """Let the optimizer have such a state."""
        self.optimizer.state.update(states)


class Stage0(Zero):
    """ZeRO 0: everything is whole on every process, and the gradients are averaged."""

    deals_gradients = False

    @override
    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.trained if parameter.grad is not None]

    @override
    def set_weights(self, weights: Mapping[Parameter, Tensor]) -> None:
        for parameter, weight in weights.items():
            parameter.copy_(weight)


class Partitioned(Zero):
    """A stage in which the optimizer works on flat parts."""

    @abstractmethod
    def flats(self) -> list[tuple[Parameter, list[Parameter]]]:
        """Return each flat tensor that the optimizer works on, with the parameters of which it has a part."""

    @abstractmethod
    def shape(self, parameter: Parameter) -> torch.Size:
        """Return the shape of a whole parameter."""

    @abstractmethod
    def set_state(self, parameter: Parameter, name: str, whole: Tensor) -> None:
        """Put what this process has of a state's whole tensor in its place."""

    def link(self, flat: Parameter, parameters: Sequence[Parameter]) -> None:
        """Let DeepSpeed know the state of a flat tensor."""

    @override
    def take_states(self, original_device: Callable[[Parameter], torch.device]) -> dict[Tensor, State]:
        states: dict[Tensor, State] = {}
        for flat, parameters in self.flats():
            self.link(flat, parameters)
            for name, value in self.optimizer.state.get(flat, {}).items():
                for parameter in parameters:
                    if is_entrywise(value, flat.shape):
                        whole = safe_get_full_optimizer_state(parameter, name).reshape(self.shape(parameter))
                        state = whole.to(original_device(parameter))
                    else:
                        state = copy.deepcopy(value)
                    states.setdefault(parameter, {})[name] = state
        return states

    @override
    def give_states(self, states: Mapping[Tensor, State]) -> None:
        for flat, parameters in self.flats():
            known = [parameter for parameter in parameters if parameter in states]
            if not known:
                continue
            like, shape = states[known[0]], self.shape(known[0])
            entrywise = {name for name, value in like.items() if is_entrywise(value, shape)}
            self.optimizer.state[flat] = {
                name: torch.zeros_like(flat, dtype=value.dtype) if name in entrywise else copy.deepcopy(value)
                for name, value in like.items()
            }
            self.link(flat, parameters)
            for parameter in known:
                for name in entrywise:
                    self.set_state(parameter, name, states[parameter][name])


class Stage1And2(Partitioned):
    """ZeRO 1 and 2: weights are whole, and views of flat tensors; each process updates a part of these."""

    @override
    def gradients(self) -> list[Tensor]:
        if not self.inner.cpu_offload:
            return [piece for pieces in self.inner.averaged_gradients.values() for piece in pieces or ()]
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies to the host are under way
        return [flat.grad for flat in self.inner.single_partition_of_fp32_groups if flat.grad is not None]

    @override
    def whole(self, parameter: Parameter) -> Tensor:
        return safe_get_full_fp32_param(parameter) if self.has_masters(parameter) else parameter.detach()

    @override
    def set_weights(self, weights: Mapping[Parameter, Tensor]) -> None:
        for parameter, weight in weights.items():
            parameter.copy_(weight)
            if self.has_masters(parameter):
                deepspeed.utils.safe_set_full_fp32_param(parameter, weight.float())
        if not any(map(self.has_masters, weights)):
            self.inner.refresh_fp32_params()

    @override
    def flats(self) -> list[tuple[Parameter, list[Parameter]]]:
        return list(zip(self.inner.single_partition_of_fp32_groups, self.inner.bit16_groups, strict=True))

    @override
    def shape(self, parameter: Parameter) -> torch.Size:
        return parameter.shape

    @override
    def set_state(self, parameter: Parameter, name: str, whole: Tensor) -> None:
        safe_set_full_optimizer_state(parameter, whole, name)

    @override
    def link(self, flat: Parameter, parameters: Sequence[Parameter]) -> None:
        if flat in self.optimizer.state:
            lazy_init_hp_params_optimizer_state(parameters, flat, self.optimizer.state)


class Stage3(Partitioned):
    """ZeRO 3: of each weight, too, a process has a part alone, but for while it is used."""

    @torch.no_grad()
    @override
    def begin(self, model: nn.Module) -> None:
        """Zero what fills the last parts up: it is what was in memory, and differs from run to run."""
        for parameter in model.parameters():
            part = is_partitioned(parameter).ds_tensor
            real = min(max(is_partitioned(parameter).ds_numel - dist.get_rank() * part.numel(), 0), part.numel())
            part[real:].zero_()
            if id(parameter) in self._trained_ids:
                safe_get_local_fp32_param(parameter)[real:].zero_()
        self.hold_flats()

    @override
    def gradients(self) -> list[Tensor]:
        return [safe_get_local_grad(parameter) for parameter in self.trained]

    @override
    def set_gradients(self, gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(self.trained, gradients, strict=True):
            safe_set_local_grad(parameter, gradient)

    @override
    def held(self, parameter: Parameter) -> Tensor:
        part: Tensor = is_partitioned(parameter).ds_tensor
        return part

    @override
    def whole(self, parameter: Parameter) -> Tensor:
        if self.has_masters(parameter):
            return safe_get_full_fp32_param(parameter).reshape(self.shape(parameter))
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    @override
    def set_weights(self, weights: Mapping[Parameter, Tensor]) -> None:
        for parameter, weight in weights.items():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(weight)
            if id(parameter) in self._trained_ids:
                safe_set_local_fp32_param(parameter, slice_partition(parameter, weight.to(self.engine.device).float()))
        self.inner.checkpoint_event_epilogue()  # small weights are whole all the time

    @contextlib.contextmanager
    @override
    def updating(self) -> Iterator[None]:
        """Let DeepSpeed choose what the optimizer works on."""
        for group in self.optimizer.param_groups:
            group["params"] = []
        yield
        self.hold_flats()

    def hold_flats(self) -> None:
        """Let the optimizer hold what it works on, so that it can tell its state."""
        for group in self.optimizer.param_groups:
            group["params"] = []
        for flat, parameters in self.flats():
            number = next(n for n, group in enumerate(self.groups) if any(p is parameters[0] for p in group))
            self.optimizer.param_groups[number]["params"].append(flat)

    @override
    def flats(self) -> list[tuple[Parameter, list[Parameter]]]:
        return list(zip(self.inner.fp32_partitioned_groups_flat, self.inner.fp16_groups, strict=True))

    @override
    def shape(self, parameter: Parameter) -> torch.Size:
        shape: torch.Size = is_partitioned(parameter).ds_shape
        return shape

    @override
    def set_state(self, parameter: Parameter, name: str, whole: Tensor) -> None:
        safe_set_local_optimizer_state(parameter, slice_partition(parameter, whole), name)


STAGES: tuple[type[Zero], ...] = (Stage0, Stage1And2, Stage1And2, Stage3)


def is_partitioned(parameter: Parameter) -> Any:
    """Return a parameter of ZeRO 3 as one that has `ds_tensor`, `ds_numel` and `ds_shape`, of which no type tells."""
    return parameter


def slice_partition(parameter: Parameter, whole: Tensor) -> Tensor:
    """Cut this process's part of a parameter out of a whole tensor, the last one filled up with zeros."""
    size: int = is_partitioned(parameter).ds_tensor.numel()
    start = dist.get_rank() * size
    piece = whole.flatten()[start : start + size]
    return nn.functional.pad(piece, (0, size - piece.numel()))


def is_entrywise(value: object, shape: torch.Size) -> bool:
    """Say whether a value of an optimizer's state has one entry for each of a tensor's."""
    return isinstance(value, Tensor) and value.shape == shape and value.dim() > 0
