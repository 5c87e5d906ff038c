"""The engine for models that torch shards in place: FSDP2, tensor parallelism, or both.

```
start   broadcast rank 0's weights -> unbind the optimizer -> shard the model: its parameters become DTensors
        -> bind the optimizer to the DTensors, and shard its state like them
step    gradients accumulate; the last batch reduce-scatters them, and each rank keeps its shard
end     gather the DTensors into the user's own parameters, and the optimizer's state; undo all other changes
```
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from types import SimpleNamespace
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

# torch has no public way to forget that a module was sharded, and refuses to shard such a module again.
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn import Parameter
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from typing_extensions import override

from ptacc.engines.base import Closure, OptimizerSlot, all_parameters, join_trained
from ptacc.engines.common import OriginalModel, broadcast_buffers, broadcast_tensors
from ptacc.engines.default import TorchEngine
from ptacc.engines.reducer import OutsideModel
from ptacc.engines.root_forward import RootForward, reshard
from ptacc.model.gradients import clip_known_norm
from ptacc.model.wrapping import call_contexts, calling
from ptacc.tensors.dtensor import full_tensor, is_dtensor, match_placement, to_local
from ptacc.types.protocols import AcceleratorProtocol

HOOK_PACKAGES = ("torch.distributed.fsdp", "torch.distributed.tensor", "ptacc.engines")
"""The packages whose hooks a sharded model has."""


def make_mesh(device: torch.device, sizes: Mapping[str, int]) -> DeviceMesh:
    """Return the device mesh of all ranks from its dimensions' sizes by name; the last one has neighbouring ranks."""
    return _make_mesh(dist.group.WORLD, device.type, tuple(sizes.items()))


@functools.lru_cache(maxsize=16)
def _make_mesh(_: object, device_type: str, sizes: tuple[tuple[str, int], ...]) -> DeviceMesh:
    """Make a mesh once for each process group of all ranks: its own process groups are never freed."""
    names, lengths = zip(*sizes, strict=True)
    return init_device_mesh(device_type, lengths, mesh_dim_names=names)


class ShardedEngine(TorchEngine):
    """Trains a sharded model with the user's own optimizer, which steps on the local shards."""

    can_update_separately = False

    def __init__(
        self,
        accelerator: AcceleratorProtocol,
        model: nn.Module,
        slots: Sequence[OptimizerSlot],
        shard: Callable[[nn.Module], object],
        *,
        unshard_after_run: bool = True,
    ) -> None:
        """Shard a model and the state of its optimizers. A collective.

        Args:
            accelerator: The accelerator of the launch.
            model: The user's model. One that an earlier run left sharded is used as it is.
            slots: The optimizers.
            shard: Shards a model in place.
            unshard_after_run: Whether `release` gathers the model on every rank.
        """
        self._sharded: ShardedModel | None = None
        self._unshard_after_run = unshard_after_run
        if not any(map(is_dtensor, model.parameters())):
            with rebinding_optimizers(model, slots):
                self._sharded = ShardedModel(model, accelerator.device, shard)
        super().__init__(accelerator, model, slots)
        self._outside = OutsideModel(model, self._trained, slots, accelerator.device)
        root = call_contexts.get(model)
        self._root = root if isinstance(root, RootForward) else None
        self._frozen_units = [unit for unit in get_units(model) if not is_trained(unit)]

    @property
    @override
    def can_step_by_closure(self) -> bool:
        return False

    @override
    def around_batch(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        for unit in filter(is_trained, list(self._frozen_units)):
            unit._init_mp_dtypes()  # noqa: SLF001  # torch does so once, and a frozen unit has no dtype for gradients
            self._frozen_units.remove(unit)
        if isinstance(self._unwrapped_model, FSDPModule):
            self._unwrapped_model.set_requires_gradient_sync(is_last)
        return calling(self._unwrapped_model)

    @override
    def backward(self, loss: Tensor) -> None:
        super().backward(loss if self._root is None else self._root.end(loss))

    @override
    def unscale_gradients(self) -> None:
        self._outside.reduce()
        if self._scaler is not None:
            for slot in self._slots:
                unscale_shards(self._scaler, slot.optimizer)

    @override
    def clip_norm(self, max_norm: float | Tensor) -> Tensor:
        return clip_sharded_norm(all_parameters(self._slots), max_norm)

    @override
    def clip_value(self, max_value: float) -> None:
        with implicit_replication():
            super().clip_value(max_value)

    @override
    def update(self, closure: Closure | None = None) -> bool:
        """Step every optimizer, clear the gradients, and broadcast rank 0's buffers."""
        with implicit_replication():  # a foreach step mixes DTensors with the plain tensors that a plan does not shard
            happened = super().update(closure)
        broadcast_buffers(self._trained)
        return happened

    @override
    def release(self) -> None:
        if self._sharded is not None and self._unshard_after_run:
            with rebinding_optimizers(self._unwrapped_model, self._slots):
                self._sharded.release()
            self._sharded = None

    @override
    def close(self) -> None:
        self._outside.close()


# ---- the model


class ShardedModel:
    """A user's model, sharded in place for a run.

    The model gets DTensors in the place of the user's own parameters. Those are emptied, and `release` fills them
    again, so that references to them, such as tied weights, stay valid.
    """

    def __init__(self, model: nn.Module, device: torch.device, shard: Callable[[nn.Module], object]) -> None:
        """Shard `model` with `shard`. A collective."""
        broadcast_tensors((*model.parameters(), *model.buffers()), device)
        self._model = model
        self._classes = {module: type(module) for module in model.modules()}  # FSDP2 changes them to subclasses
        self._original = OriginalModel(model, HOOK_PACKAGES)
        self._owners = [
            (module, name, parameter)
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        ]
        shard(model)
        move_unsharded(model, device)
        self._original.record_added_attributes()
        remaining = set(model.parameters())
        for parameter in self._original.devices:
            if parameter not in remaining:
                parameter.data = parameter.data.new_empty(0)
        if isinstance(model, FSDPModule):
            RootForward(model)

    @torch.no_grad()
    def release(self) -> None:
        """Gather the model into the user's own parameters, on their original devices. A collective."""
        reshard(self._model)
        call_contexts.pop(self._model, None)
        shards = {original: getattr(module, name) for module, name, original in self._owners}
        for original, shard in shards.items():
            original.data = full_tensor(shard.detach()).to(self._original.devices[original])
            original.requires_grad_(shard.requires_grad)
            original.grad = None
        for module, original_class in self._classes.items():
            module.__class__ = original_class
            _module_state_mapping.pop(module, None)
        self._original.restore()
        for module, name, original in self._owners:
            setattr(module, name, original)


def move_unsharded(model: nn.Module, device: torch.device) -> None:
    """Move the tensors that were not sharded: torch moves the layers of a plan only, and Accelerate none of the model.

    They stay the same objects, which the optimizer holds.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if not is_dtensor(tensor):
            tensor.data = tensor.data.to(device)


def get_units(model: nn.Module) -> list[FSDPParamGroup]:
    """Return the units of FSDP2 in a model, without those that have no parameters."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    units: list[FSDPParamGroup] = []
    for state in [module._get_fsdp_state() for module in modules]:  # noqa: SLF001  # torch has no public way to them
        # In older versions of torch, a module has one of them at most.
        units += getattr(state, "_fsdp_param_groups", None) or filter(None, [getattr(state, "_fsdp_param_group", None)])
    return units


def is_trained(unit: FSDPParamGroup) -> bool:
    """Return whether a parameter of a unit is not frozen."""
    return any(parameter.sharded_param.requires_grad for parameter in unit.fsdp_params)


# ---- the optimizers


@contextlib.contextmanager
def rebinding_optimizers(model: nn.Module, slots: Sequence[OptimizerSlot]) -> Generator[None]:
    """Surround a change of the model's parameters: the optimizers then hold the new ones of the same names.

    The parameters are released for the block, so that their memory can be freed.
    """
    trained = join_trained(model, slots)
    names: dict[Tensor, str] = {parameter: name for name, parameter in trained.named_parameters()}
    states = [{names[p]: dict(state) for p, state in slot.optimizer.state.items()} for slot in slots]
    groups = [group for slot in slots for group in slot.optimizer.param_groups]
    names_by_group = [[names[parameter] for parameter in group["params"]] for group in groups]
    del names  # it refers to the parameters
    for slot in slots:
        slot.optimizer.state.clear()
    for group in groups:
        group["params"] = []
    try:
        yield
    finally:
        parameters = dict(trained.named_parameters())
        for group, its_names in zip(groups, names_by_group, strict=True):
            group["params"] = [parameters[name] for name in its_names]
        for slot, by_name in zip(slots, states, strict=True):
            for name, state in by_name.items():
                placed = {key: match_placement(parameters[name], value) for key, value in state.items()}
                slot.optimizer.state[parameters[name]] = placed


# ---- gradients


@torch.no_grad()
def unscale_shards(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
    """Do what `GradScaler.unscale_` does, with the same outcome on every rank. A collective.

    torch itself takes the placement of the first gradient for that of all, and ranks could differ in which steps they
    skip.
    """
    shards: list[Tensor] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                shards.append(to_local(parameter.detach()))
                shards[-1].grad = to_local(parameter.grad)
    local = cast(Optimizer, SimpleNamespace(param_groups=[{"params": shards}]))
    scaler.unscale_(local)
    states = scaler._per_optimizer_states  # noqa: SLF001  # torch has no public way to set what it found
    states[id(optimizer)] = states.pop(id(local))
    for found_inf in states[id(optimizer)]["found_inf_per_device"].values():
        dist.all_reduce(found_inf, dist.ReduceOp.MAX)


def clip_sharded_norm(parameters: Sequence[Parameter], max_norm: float | Tensor) -> Tensor:
    """Scale gradients to a norm of at most `max_norm`, and return the norm before: a plain scalar, equal on all ranks.

    Gradients may lie on several meshes, which `clip_grad_norm_` of torch does not support.
    """
    by_placement: dict[object, list[Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_placement.setdefault(get_placement(parameter.grad), []).append(parameter)
    squares = [compute_squared_norm([p.grad for p in group if p.grad is not None]) for group in by_placement.values()]
    norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros((), device="cpu")
    for group in by_placement.values():
        clip_known_norm(group, max_norm, norm)
    return norm


def get_placement(tensor: Tensor) -> tuple[object, tuple[int, ...]]:
    """Return the mesh of a tensor, and the mesh dimensions over which it is sharded."""
    if not is_dtensor(tensor):
        return None, ()
    return tensor.device_mesh, tuple(dim for dim, placed in enumerate(tensor.placements) if not placed.is_replicate())


def compute_squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the squared norm of tensors with the same placement. A collective if they are sharded."""
    square = get_total_norm([to_local(tensor) for tensor in tensors]).square()
    if is_dtensor(first := tensors[0]):
        for dim in get_placement(first)[1]:
            dist.all_reduce(square, group=first.device_mesh.get_group(dim))
    return square
