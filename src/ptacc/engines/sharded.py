"""A sharded engine: weights, gradients and the optimizer's state are dealt over the processes by torch itself.

```
begin   rank 0's weights everywhere -> the optimizer lets go -> the model is sharded in place
        -> the optimizer takes the shards, its state dealt as they are
step    gradients add up whole; in the step's last batch they are averaged, and each process keeps its part
end     shards -> whole tensors, in the user's own parameters; the model is what it was before
```
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

# torch has no public way to let it forget that a module was sharded, and refuses to shard it again.
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from typing_extensions import override

from ptacc.engines.base import OptimizerSlot
from ptacc.engines.common import remove_hooks, broadcast_buffers
from ptacc.engines.ddp import TorchEngine
from ptacc.errors import CheckpointError
from ptacc.tensors.dtensor import (
    AssembledTensor,
    Shard,
    ShardingSpec,
    from_local,
    is_dtensor,
    local_index_ranges,
    match_placement,
    slice_local,
    full_tensor,
)
from ptacc.types.protocols import AcceleratorProtocol

Sharding: TypeAlias = Callable[[nn.Module], object]
SHARDING_PACKAGES = ("torch.distributed.fsdp", "torch.distributed.tensor", "ptacc.engines.fsdp")
"""The modules whose hooks a sharded model carries."""


# ---- the optimizer: from whole parameters to shards, and back


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer holds, by the names of its parameters instead of the parameters themselves."""

    optimizer: Optimizer
    names: tuple[tuple[str, ...], ...]
    state: Mapping[str, dict[str, Any]]

    @classmethod
    def detach(cls, optimizer: Optimizer, names: Mapping[Tensor, str]) -> OptimizerState:
        """Take an optimizer's parameters and state away, so that their memory is free."""
        groups = tuple(tuple(names[parameter] for parameter in group["params"]) for group in optimizer.param_groups)
        state = {names[parameter]: dict(entry) for parameter, entry in optimizer.state.items()}
        optimizer.state.clear()
        for group in optimizer.param_groups:
            group["params"] = []
        return cls(optimizer, groups, state)

    def attach(self, parameters: Mapping[str, Parameter]) -> None:
        """Let the optimizer hold the parameters of these names, and what it keeps of each in the form that it has."""
        for group, names in zip(self.optimizer.param_groups, self.names, strict=True):
            group["params"] = [parameters[name] for name in names]
        for name, entry in self.state.items():
            parameter = parameters[name]
            self.optimizer.state[parameter] = {key: match_placement(parameter, value) for key, value in entry.items()}


# ---- the model: sharded in place, and given back


@dataclass(frozen=True)
class ModuleSnapshot:
    """What sharding changes of a module beside its parameters.

    Args:
        kind: Its class.
        attributes: The names of its own attributes.
    """

    kind: type[nn.Module]
    attributes: frozenset[str]

    @classmethod
    def capture(cls, module: nn.Module) -> ModuleSnapshot:
        """Remember the looks of `module`."""
        return cls(type(module), frozenset(vars(module)))

    def restore(self, module: nn.Module, added: frozenset[str]) -> None:
        """Put them back: take `added` attributes away, and the hooks of torch's distributed packages off."""
        module.__class__ = self.kind
        _module_state_mapping.pop(module, None)
        for name in added:
            vars(module).pop(name, None)
        remove_hooks(module, SHARDING_PACKAGES)


class ShardedModel:
    """A user's model, sharded in place.

    The user's own parameters wait, empty, for their values to come back: who refers to them finds them again.
    """

    def __init__(self, model: nn.Module, device: torch.device, shard: Sharding) -> None:
        """Have `shard` replace the parameters of `model`. A collective."""
        broadcast_model(model, device)
        self._model = model
        self._looks = {module: ModuleSnapshot.capture(module) for module in model.modules()}
        self._places = [
            (module, name, parameter)
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        ]
        self._devices = {parameter: parameter.device for parameter in model.parameters()}
        self._buffer_devices = {name: buffer.device for name, buffer in model.named_buffers()}
        shard(model)
        self._added = {module: frozenset(vars(module)) - looks.attributes for module, looks in self._looks.items()}
        remaining = {id(parameter) for parameter in model.parameters()}
        for parameter in self._devices:
            if id(parameter) not in remaining:
                parameter.data = parameter.data.new_empty(0)
        # After a forward pass that no backward pass follows, the root would stay whole.
        self._resharding = model.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else self.reshard())

    def reshard(self) -> None:
        """Have all parameters in shards, and nothing whole."""
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @torch.no_grad()
    def release(self) -> None:
        """Have the user's own model again, whole, on the devices it was on. A collective: one tensor at a time."""
        self.reshard()
        self._resharding.remove()
        shards = {original: getattr(module, name) for module, name, original in self._places}
        for original, shard in shards.items():
            original.data = full_tensor(shard.detach()).to(self._devices[original])
            original.requires_grad_(shard.requires_grad)
            original.grad = None
        for module, looks in self._looks.items():
            looks.restore(module, self._added[module])
        for module, name, original in self._places:
            setattr(module, name, original)
        for name, buffer in self._model.named_buffers():
            buffer.data = buffer.data.to(self._buffer_devices[name])


@torch.no_grad()
def broadcast_model(model: nn.Module, device: torch.device) -> None:
    """Give all processes rank 0's weights and buffers: else what is put together would be parts of different models."""
    for tensor in (*model.parameters(), *model.buffers()):
        value = tensor.detach().to(device)
        dist.broadcast(value, src=0)
        tensor.copy_(value)


# ---- the engine


def make_mesh(device: torch.device, sizes: Mapping[str, int]) -> DeviceMesh:
    """Make the mesh of all processes, of these sizes by name; the last one is of neighbouring ranks."""
    return init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


class ShardedEngine(TorchEngine):
    """A model in shards, and the user's own optimizer stepped bare on them."""

    def __init__(
        self,
        accelerator: AcceleratorProtocol,
        model: nn.Module,
        slots: Sequence[OptimizerSlot],
        shard: Sharding,
        *,
        gives_back: bool = True,
    ) -> None:
        """Shard a model and what the optimizers hold. A collective.

        Args:
            accelerator: The device.
            model: The bare model; one that an earlier run left in shards is taken as it is.
            slots: The optimizers.
            shard: Shards a model in place.
            gives_back: Whether the model becomes whole again at the end of the run.
        """
        self._sharded: ShardedModel | None = None
        self._gives_back = gives_back
        if not any(map(is_dtensor, model.parameters())):
            with rebinding_optimizers(model, slots):
                self._sharded = ShardedModel(model, accelerator.device, shard)
        # For the precision, and the compiler. It wraps nothing: DDP is for models that are whole.
        super().__init__(accelerator, model, refresh_slots(slots), in_replicas=False)
        self._forms = {ShardingSpec.from_tensor(p): p for p in model.parameters() if is_dtensor(p)}

    @override
    def around_batch(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Have the gradients averaged in the last batch alone."""
        if isinstance(self._bare_model, FSDPModule):
            self._bare_model.set_requires_gradient_sync(is_last)
        return contextlib.nullcontext()

    @override
    def clip_norm(self, max_norm: float) -> Tensor:
        """Scale the gradients of each slot, and return the norm of them all: a plain scalar, equal everywhere."""
        norms = [clip_sharded_norm(slot.parameters, max_norm) for slot in self._slots]
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))

    @override
    def unscale_gradients(self) -> None:
        """Divide the gradients by the scaler's factor."""
        with implicit_replication():
            super().unscale_gradients()

    @override
    def clip_value(self, max_value: float) -> None:
        """Clamp each entry of the gradients."""
        with implicit_replication():
            super().clip_value(max_value)

    @override
    def update(self) -> bool:
        """Step every optimizer, clear the gradients, and give all processes rank 0's buffers, as DDP does."""
        with implicit_replication():  # a plan may leave tensors whole, which optimizers take together with dealt ones
            happened = super().update()
        broadcast_buffers(self._bare_model)
        return happened

    @override
    def release(self) -> None:
        """Have the user's model whole again, and what the optimizers keep. A collective."""
        if self._sharded is not None and self._gives_back:
            with rebinding_optimizers(self._bare_model, self._slots):
                self._sharded.release()
            # The run outlives this, and the shards need not.
            self._sharded, self._slots, self._forms = None, refresh_slots(self._slots), {}

    @override
    def localize(self, value: Any) -> Any:
        """Return what was saved of a tensor, whole or this process's part of it, as one that is dealt."""
        if not isinstance(value, Shard | AssembledTensor):
            return value
        form = self._forms.get(value.sharding)
        if form is None:
            known = ", ".join(map(str, self._forms))
            raise CheckpointError(f"A tensor was dealt as {value.sharding}, and this engine deals them as {known}.")
        mesh, placements = form.device_mesh, form.placements
        shape = value.shape if isinstance(value, Shard) else tuple(value.tensor.shape)
        runs = local_index_ranges(shape, mesh, placements)
        if isinstance(value, Shard) and value.index_ranges != runs:
            raise CheckpointError(f"A part of a tensor of shape {shape} was saved for another place than this one's.")
        local = value.local if isinstance(value, Shard) else slice_local(value.tensor, runs)
        return from_local(mesh, placements, shape, local)


def refresh_slots(slots: Sequence[OptimizerSlot]) -> tuple[OptimizerSlot, ...]:
    """Return the slots of the same optimizers with the parameters that these hold now."""
    return tuple(OptimizerSlot.create(slot.name, slot.optimizer) for slot in slots)


@contextlib.contextmanager
def rebinding_optimizers(model: nn.Module, slots: Sequence[OptimizerSlot]) -> Iterator[None]:
    """Let the optimizers hold after the block what stands in the model then."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    held = [OptimizerState.detach(slot.optimizer, names) for slot in slots]
    try:
        yield
    finally:
        parameters = dict(model.named_parameters())
        for holding in held:
            holding.attach(parameters)


def clip_sharded_norm(parameters: Sequence[Parameter], max_norm: float) -> Tensor:
    """Scale gradients to a norm of at most `max_norm`, and return the norm they had.

    They may lie on several meshes, which torch's own function refuses.
    """
    by_place: dict[object, list[Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_place.setdefault(get_placement(parameter.grad), []).append(parameter)
    squares = [compute_squared_norm([p.grad for p in group if p.grad is not None]) for group in by_place.values()]
    norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
    for group in by_place.values():
        clip_grads_with_norm_(group, max_norm, norm)
    return norm


def get_placement(tensor: Tensor) -> tuple[object, tuple[int, ...]]:
    """Return the mesh that a tensor lies on, and the dimensions over which it is dealt out."""
    if not is_dtensor(tensor):
        return None, ()
    return tensor.device_mesh, tuple(dim for dim, placed in enumerate(tensor.placements) if not placed.is_replicate())


def compute_squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the square of the norm of tensors that lie in one place. A collective where they are dealt out."""
    square = get_total_norm([tensor.to_local() if is_dtensor(tensor) else tensor for tensor in tensors]).square()
    if is_dtensor(first := tensors[0]):
        for dim in get_placement(first)[1]:
            dist.all_reduce(square, group=first.device_mesh.get_group(dim))
    return square
