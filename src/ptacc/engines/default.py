"""The engine of a single rank, on which the others are built."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer
from typing_extensions import override

from ptacc.engines.base import Engine, EngineState, OptimizerSlot, all_parameters
from ptacc.engines.common import has_own_zero_grad
from ptacc.model.state_dict import get_weights, load_optimizer_state, load_weights
from ptacc.model.wrapping import prepare_model
from ptacc.types.protocols import AcceleratorProtocol


class TorchEngine(Engine):
    """Plain torch with any torch optimizer, and a gradient scaler if the precision needs one.

    The optimizer is not wrapped. Accelerate's wrapper adds a third to the time of a small step, and its functions are
    not needed here.
    """

    def __init__(
        self,
        accelerator: AcceleratorProtocol,
        model: nn.Module,
        slots: Sequence[OptimizerSlot],
        scaler: torch.amp.GradScaler | None = None,
        *,
        uses_ddp: bool = False,
    ) -> None:
        """Wrap a model for the device, the precision and the ranks.

        Args:
            accelerator: The accelerator of the launch.
            model: The user's model.
            slots: The optimizers.
            scaler: A new gradient scaler; by default a copy of the accelerator's.
            uses_ddp: Whether Accelerate wraps the model in DistributedDataParallel.
        """
        self._accelerator, self._unwrapped_model = accelerator, model
        # Accelerate prepares it for the device, the precision and the compiler.
        self._model = prepare_model(accelerator, model, uses_ddp=uses_ddp)
        self._slots = tuple(slots)
        self._scaler = scaler or copy.deepcopy(accelerator.scaler)  # each run starts with the same scale

    @property
    @override
    def model(self) -> nn.Module:
        return self._model

    @property
    @override
    def slots(self) -> Sequence[OptimizerSlot]:
        return self._slots

    @override
    def around_batch(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @override
    def backward(self, loss: Tensor) -> None:
        if self._scaler is not None:
            loss = self._scaler.scale(loss)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated

    @override
    def unscale_gradients(self) -> None:
        if self._scaler is not None:
            for slot in self._slots:
                self._scaler.unscale_(slot.optimizer)

    @override
    def clip_norm(self, max_norm: float) -> Tensor:
        return clip_grad_norm_(all_parameters(self._slots), max_norm)

    @override
    def clip_value(self, max_value: float) -> None:
        clip_grad_value_(all_parameters(self._slots), max_value)

    @override
    def update(self) -> bool:
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

    @override
    def close(self) -> None: ...

    @override
    def release(self) -> None:
        """Do nothing: wrapping leaves no trace in the user's model."""

    @override
    def get_state(self) -> EngineState:
        optimizers = {slot.name: slot.optimizer.state_dict() for slot in self._slots}
        shared = {} if self._scaler is None else {"scaler": self._scaler.state_dict()}
        return EngineState(get_weights(self._unwrapped_model), optimizers, shared)

    @override
    def load_state(self, state: EngineState) -> None:
        load_weights(self._unwrapped_model, state.weights, strict=False)
        for slot in self._slots:
            if slot.name in state.optimizers:
                load_optimizer_state(slot.optimizer, state.optimizers[slot.name])
        if self._scaler is not None and "scaler" in state.shared:
            self._scaler.load_state_dict(state.shared["scaler"])


def clear_gradients(optimizer: Optimizer) -> None:
    """Do what `Optimizer.zero_grad()` does in a tenth of its time. A `zero_grad` of a class or an object is called."""
    if has_own_zero_grad(optimizer):
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def step_scaled(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> bool:
    """Step an optimizer unless its gradients overflowed, and return whether it stepped.

    The scaler itself reads from the device whether they overflowed; nothing further is read here. A fused optimizer is
    called in any case and skips on the device: for it alone, the scaler's `found_inf` is read.
    """
    overflows: list[Tensor | None] = []
    handle = optimizer.register_step_post_hook(
        lambda stepped, *_: overflows.append(getattr(stepped, "found_inf", None))
    )
    try:
        scaler.step(optimizer)
    finally:
        handle.remove()
    return bool(overflows) and not (overflows[0] is not None and overflows[0].item())
