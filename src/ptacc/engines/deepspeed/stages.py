"""The stages of ZeRO: where DeepSpeed keeps weights, gradients and the optimizer's state, and access to them.

```
stage   weights in forward passes        gradients                    what the optimizer steps on
0       the user's parameters            the user's, averaged         the user's parameters
1, 2    views of a flat buffer for       this rank's partition of     this rank's partition of each flat buffer,
        each parameter group             each flat buffer             in float32
3       gathered for each submodule;     this rank's partition of     flat buffers of this rank's partitions,
        else this rank's partition       each parameter               in float32
        of each parameter
```

With bfloat16 weights, the float32 buffers are *master weights*: the optimizer updates them, and DeepSpeed casts them
for forward passes.

The optimizer's state is converted between flat buffers and parameters entry by entry, which is right for optimizers
that update each entry independently.
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
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
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.nn import Parameter
from typing_extensions import override

from ptacc.engines.base import OptimizerSlot

ParameterState = dict[str, Any]
"""The optimizer's state of one parameter."""


class Stage0:
    """Access to weights, gradients and optimizer state under ZeRO 0: replicas. Other stages override it.

    Args:
        engine: DeepSpeed's engine.
        slot: The user's optimizer, in which DeepSpeed may have replaced the parameters.
        groups: The parameters before that, by the optimizer's parameter groups.
    """

    is_partitioned: bool = False
    """Whether gradients and the optimizer's state are partitioned over ranks."""

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, slot: OptimizerSlot, groups: Sequence[Sequence[Parameter]]
    ) -> None:
        self._engine, self._optimizer, self._groups = engine, slot.optimizer, groups
        self.trained: list[Parameter] = [p for group in groups for p in group if p.requires_grad]
        self._trained = frozenset(self.trained)
        self.zero_optimizer: Any = engine.optimizer
        """DeepSpeed's wrapper of the optimizer. It is untyped."""

    def prepare(self, model: nn.Module) -> None:
        """Prepare the partitions for the first step."""

    def gradients(self) -> list[Tensor]:
        """Return this rank's gradients. `set_gradients` has to be called after a change in them."""
        return [parameter.grad for parameter in self.trained if parameter.grad is not None]

    def set_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Write changed gradients back, where `gradients` returned copies."""

    def gather_weight(self, parameter: Parameter) -> Tensor:
        """Return the full weight that the optimizer updates. A collective, unless the parameter itself is that."""
        return parameter.detach()

    def set_weights(self, weights: Mapping[Parameter, Tensor]) -> None:
        """Replace weights by full ones, equal on all ranks. A collective."""
        for parameter, weight in weights.items():
            parameter.copy_(weight)

    @contextlib.contextmanager
    def stepping(self) -> Generator[None]:
        """Surround a step of DeepSpeed's engine."""
        yield

    def has_master_weight(self, parameter: Parameter) -> bool:
        """Return whether forward passes use a copy of a weight, in less precision than the one that is updated."""
        return parameter in self._trained and parameter.dtype != torch.float32

    # ---- the optimizer's state

    def gather_optimizer_state(self, devices: Mapping[Parameter, torch.device]) -> dict[Tensor, ParameterState]:
        """Return the full optimizer state by the user's parameters, on their devices. A collective: by tensor."""
        return dict(self._optimizer.state)

    def scatter_optimizer_state(self, states: Mapping[Tensor, ParameterState]) -> None:
        """Load this rank's partition of a full optimizer state."""
        self._optimizer.state.update(states)


class Partitioned(Stage0, ABC):
    """A stage in which the optimizer steps on flat buffers."""

    is_partitioned = True

    @abstractmethod
    def flat_buffers(self) -> list[tuple[Parameter, list[Parameter]]]:
        """Return each flat buffer of the optimizer with the parameters it has partitions of."""

    @abstractmethod
    def set_local_state(self, parameter: Parameter, name: str, full: Tensor) -> None:
        """Write this rank's partition of a full tensor of the optimizer's state."""

    def link_state(self, flat: Parameter, parameters: Sequence[Parameter]) -> None:
        """Map the state of a flat buffer to its parameters, for DeepSpeed's access functions."""

    @override
    def gather_optimizer_state(self, devices: Mapping[Parameter, torch.device]) -> dict[Tensor, ParameterState]:
        states: dict[Tensor, ParameterState] = {}
        for flat, parameters in self.flat_buffers():
            self.link_state(flat, parameters)
            for name, value in self._optimizer.state.get(flat, {}).items():
                for parameter in parameters:
                    if is_entrywise(value, flat.shape):
                        full = safe_get_full_optimizer_state(parameter, name).reshape(full_shape(parameter))
                        state = full.to(devices[parameter])
                    else:
                        state = copy.deepcopy(value)
                    states.setdefault(parameter, {})[name] = state
        return states

    @override
    def scatter_optimizer_state(self, states: Mapping[Tensor, ParameterState]) -> None:
        for flat, parameters in self.flat_buffers():
            stepped = [parameter for parameter in parameters if parameter in states]
            if not stepped:
                continue
            example, shape = states[stepped[0]], full_shape(stepped[0])
            entrywise = {name for name, value in example.items() if is_entrywise(value, shape)}
            self._optimizer.state[flat] = {
                name: torch.zeros_like(flat, dtype=value.dtype) if name in entrywise else copy.deepcopy(value)
                for name, value in example.items()
            }
            self.link_state(flat, parameters)
            for parameter in stepped:
                for name in entrywise:
                    self.set_local_state(parameter, name, states[parameter][name])


class Stage1And2(Partitioned):
    """ZeRO 1 and 2: parameters are views of flat buffers, of which each rank updates its partition."""

    @override
    def gradients(self) -> list[Tensor]:
        if not self.zero_optimizer.cpu_offload:
            return [piece for pieces in self.zero_optimizer.averaged_gradients.values() for piece in pieces or ()]
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # wait for the copies to the host
        return [flat.grad for flat in self.zero_optimizer.single_partition_of_fp32_groups if flat.grad is not None]

    @override
    def gather_weight(self, parameter: Parameter) -> Tensor:
        return safe_get_full_fp32_param(parameter) if self.has_master_weight(parameter) else parameter.detach()

    @override
    def set_weights(self, weights: Mapping[Parameter, Tensor]) -> None:
        for parameter, weight in weights.items():
            parameter.copy_(weight)
            if self.has_master_weight(parameter):
                safe_set_full_fp32_param(parameter, weight.float())
        if not any(map(self.has_master_weight, weights)):
            self.zero_optimizer.refresh_fp32_params()

    @override
    def flat_buffers(self) -> list[tuple[Parameter, list[Parameter]]]:
        zero = self.zero_optimizer
        return list(zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True))

    @override
    def set_local_state(self, parameter: Parameter, name: str, full: Tensor) -> None:
        safe_set_full_optimizer_state(parameter, full, name)

    @override
    def link_state(self, flat: Parameter, parameters: Sequence[Parameter]) -> None:
        if flat in self._optimizer.state:
            lazy_init_hp_params_optimizer_state(parameters, flat, self._optimizer.state)


class Stage3(Partitioned):
    """ZeRO 3: each rank has a partition of each parameter, and gathers the parameter while it is used."""

    @torch.no_grad()
    @override
    def prepare(self, model: nn.Module) -> None:
        """Zero the padding of the last partitions: it is uninitialised memory, which differs from run to run."""
        for parameter in model.parameters():
            partition = as_partitioned(parameter).ds_tensor
            start = dist.get_rank() * partition.numel()
            size = min(max(as_partitioned(parameter).ds_numel - start, 0), partition.numel())
            partition[size:].zero_()
            if parameter in self._trained:
                safe_get_local_fp32_param(parameter)[size:].zero_()
        self.bind_optimizer()

    @override
    def gradients(self) -> list[Tensor]:
        return [safe_get_local_grad(parameter) for parameter in self.trained]

    @override
    def set_gradients(self, gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(self.trained, gradients, strict=True):
            safe_set_local_grad(parameter, gradient)

    @override
    def gather_weight(self, parameter: Parameter) -> Tensor:
        if self.has_master_weight(parameter):
            return safe_get_full_fp32_param(parameter).reshape(full_shape(parameter))
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    @override
    def set_weights(self, weights: Mapping[Parameter, Tensor]) -> None:
        for parameter, weight in weights.items():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(weight)
            if parameter in self._trained:
                safe_set_local_fp32_param(parameter, slice_partition(parameter, weight.to(self._engine.device).float()))
        self.zero_optimizer.checkpoint_event_epilogue()  # gathers the small weights, which stay gathered

    @contextlib.contextmanager
    @override
    def stepping(self) -> Generator[None]:
        """Empty the optimizer's groups: DeepSpeed steps on one flat buffer after the other, and sets each itself."""
        for group in self._optimizer.param_groups:
            group["params"] = []
        yield
        self.bind_optimizer()

    def bind_optimizer(self) -> None:
        """Set the flat buffers as the optimizer's parameters, so that its `state_dict()` includes their state."""
        for group in self._optimizer.param_groups:
            group["params"] = []
        for flat, parameters in self.flat_buffers():
            number = next(n for n, group in enumerate(self._groups) if any(p is parameters[0] for p in group))
            self._optimizer.param_groups[number]["params"].append(flat)

    @override
    def flat_buffers(self) -> list[tuple[Parameter, list[Parameter]]]:
        zero = self.zero_optimizer
        return list(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True))

    @override
    def set_local_state(self, parameter: Parameter, name: str, full: Tensor) -> None:
        safe_set_local_optimizer_state(parameter, slice_partition(parameter, full), name)


STAGES: tuple[type[Stage0], ...] = (Stage0, Stage1And2, Stage1And2, Stage3)
"""The class of each stage by its number."""


def as_partitioned(parameter: Parameter) -> Any:
    """Return a parameter of ZeRO 3, untyped: DeepSpeed adds `ds_tensor` and `ds_numel` to it."""
    return parameter


def full_shape(parameter: Parameter) -> torch.Size:
    """Return the shape of a full parameter, which ZeRO 3 leaves empty."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def slice_partition(parameter: Parameter, full: Tensor) -> Tensor:
    """Return this rank's flat partition of a full tensor. The last partition is padded with zeros."""
    size: int = as_partitioned(parameter).ds_tensor.numel()
    start = dist.get_rank() * size
    partition = full.flatten()[start : start + size]
    return nn.functional.pad(partition, (0, size - partition.numel()))


def is_entrywise(value: object, shape: torch.Size) -> bool:
    """Return whether a value of an optimizer's state has one entry for each entry of a tensor of this shape."""
    return isinstance(value, Tensor) and value.shape == shape and value.dim() > 0
