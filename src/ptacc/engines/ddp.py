"""The engine for one process and for DDP."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer

from ptacc.engines.base import OptimizerSlot
from ptacc.model.state_dict import get_weights, held_parameters, load_optimizer_state, load_weights
from ptacc.model.wrapping import find_ddp_module
from ptacc.tensors.dtensor import unwrap
from ptacc.types.protocols import AcceleratorProtocol, StateDict


class TorchEngine:
    """Plain torch: one process or DDP, any torch optimizer, a gradient scaler where the precision needs one.

    The optimizer is stepped bare. Accelerate's wrapper adds a third to the time of a small step, and nothing that is
    missing here.
    """

    def __init__(
        self,
        accelerator: AcceleratorProtocol,
        model: nn.Module,
        slots: Sequence[OptimizerSlot],
        scaler: torch.amp.GradScaler | None = None,
        *,
        in_replicas: bool = True,
    ) -> None:
        """Wrap a model for the processes and the precision.

        Args:
            accelerator: The device.
            model: The bare model.
            slots: The optimizers.
            scaler: One that no run has used; as the accelerator's, if not given.
            in_replicas: Whether each process has a model of its own, so that gradients are to be averaged.
        """
        self._accelerator, self._bare_model = accelerator, model
        self._model = accelerator.prepare_model(model, evaluation_mode=not in_replicas)
        self._replica = find_ddp_module(self._model)
        self._slots = tuple(slots)
        self._scaler = scaler or copy.deepcopy(accelerator.scaler)  # each run begins with the same factor

    @property
    def model(self) -> nn.Module:
        """The model as steps call it."""
        return self._model

    @property
    def slots(self) -> Sequence[OptimizerSlot]:
        """The optimizers."""
        return self._slots

    def around_batch(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Return the context of one batch."""
        return contextlib.nullcontext() if is_last else self._accelerator.no_sync(self._model)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`."""
        if self._scaler is not None:
            loss = self._scaler.scale(loss)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated

    def unscale_gradients(self) -> None:
        """See that the processes have averaged the gradients, and divide them by the scaler's factor."""
        if self._replica is not None:
            # It looks for parameters that took no part at its next forward pass only: after the update.
            self._replica._check_reducer_finalized()  # type: ignore[no-untyped-call]  # noqa: SLF001
        if self._scaler is not None:
            for slot in self._slots:
                self._scaler.unscale_(slot.optimizer)

    def clip_norm(self, max_norm: float) -> Tensor:
        """Scale the gradients of each slot, and return the norm of them all."""
        norms = [clip_grad_norm_(slot.parameters, max_norm) for slot in self._slots]
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))

    def clip_value(self, max_value: float) -> None:
        """Clamp each entry of the gradients."""
        for slot in self._slots:
            clip_grad_value_(slot.parameters, max_value)

    def update(self) -> bool:
        """Step every optimizer and clear the gradients."""
        if self._scaler is None:
            happened = True
            for slot in self._slots:
                slot.optimizer.step()
        else:
            stepped = [step_scaled(self._scaler, slot.optimizer) for slot in self._slots]
            self._scaler.update()
            happened = all(stepped)
        for slot in self._slots:
            clear_gradients(slot.optimizer)
        return happened

    def sync_buffers(self) -> None:
        """Give all processes rank 0's buffers: each forward pass of a step does, and the last step changed them."""
        if self._replica is not None:
            for buffer in self._replica.buffers():
                dist.broadcast(buffer, src=0)

    def release(self) -> None:
        """Do nothing: a wrapper is taken off with no trace."""

    def localize(self, value: Any) -> Any:
        """Return a plain tensor."""
        return unwrap(value)

    def weights(self) -> StateDict:
        """Return the model's tensors themselves."""
        return get_weights(self._bare_model)

    def load_weights(self, weights: StateDict, *, strict: bool = True) -> None:
        """Copy tensors into the model's."""
        load_weights(self._bare_model, weights, strict=strict)

    def held_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """Iterate over the parameters, or the parts of them that this process holds."""
        return held_parameters(self._bare_model)

    def optimizer_states(self) -> Mapping[str, StateDict]:
        """Return the states of the user's own optimizers."""
        return {slot.name: slot.optimizer.state_dict() for slot in self.slots}

    def load_optimizer_state(self, name: str, state: StateDict) -> None:
        """Let an optimizer of the user's take over a state."""
        load_optimizer_state(next(slot.optimizer for slot in self.slots if slot.name == name), state)

    def own_state_dict(self) -> StateDict:
        """Return nothing: all processes have the same, or parts of it that know their place."""
        return {}

    def load_own_state_dict(self, state_dict: StateDict) -> None:
        """Do nothing."""

    def state_dict(self) -> StateDict:
        """Return the state of the gradient scaler, where there is one."""
        return {} if self._scaler is None else {"scaler": self._scaler.state_dict()}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take over the state of a gradient scaler."""
        if self._scaler is not None and "scaler" in state_dict:
            self._scaler.load_state_dict(state_dict["scaler"])


def clear_gradients(optimizer: Optimizer) -> None:
    """Do what `optimizer.zero_grad()` does, in a tenth of its time, unless its class has a way of its own."""
    if type(optimizer).zero_grad is not Optimizer.zero_grad:
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def step_scaled(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> bool:
    """Step an optimizer unless its gradients overflowed, and say whether it did.

    The scaler reads from the device whether they did, and nothing more is read here. Fused optimizers alone are stepped
    in any case, and skip on the device: what they go by is read then.
    """
    overflows: list[Tensor | None] = []
    handle = optimizer.register_step_post_hook(lambda done, *_: overflows.append(getattr(done, "found_inf", None)))
    try:
        scaler.step(optimizer)
    finally:
        handle.remove()
    return bool(overflows) and not (overflows[0] is not None and overflows[0].item())
