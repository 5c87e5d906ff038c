"""The engine of a single rank, on which the others are built."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Generator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, get_total_norm
from torch.optim import Optimizer
from typing_extensions import override

from ptacc.engines.base import Closure, Engine, EngineState, OptimizerSlot, all_parameters, join_trained
from ptacc.engines.common import has_own_zero_grad
from ptacc.model.gradients import clip_known_norm
from ptacc.model.state_dict import get_weights, load_optimizer_state, load_weights
from ptacc.model.wrapping import prepare_model
from ptacc.types.protocols import AcceleratorProtocol


class TorchEngine(Engine):
    """Plain torch with any torch optimizer, and a gradient scaler if the precision needs one.

    The optimizer is not wrapped. Accelerate's wrapper adds a third to the time of a small step, and its functions are
    not needed here.
    """

    can_update_separately: ClassVar[bool] = True
    can_unfreeze: ClassVar[bool] = True

    def __init__(
        self,
        accelerator: AcceleratorProtocol,
        model: nn.Module,
        slots: Sequence[OptimizerSlot],
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Wrap a model for the device and the precision. By default, the scaler is a copy of the accelerator's."""
        self._accelerator, self._unwrapped_model = accelerator, model
        # Accelerate prepares it for the device, the precision and the compiler.
        self._model = prepare_model(accelerator, model)
        self._slots = self._active = tuple(slots)
        self._trained = join_trained(model, slots)
        self._new_scaler = scaler or accelerator.scaler
        self._scalers: dict[str, torch.amp.GradScaler] = {} if scaler is None else {"scaler": scaler}

    @property
    @override
    def model(self) -> nn.Module:
        return self._model

    @property
    @override
    def slots(self) -> Sequence[OptimizerSlot]:
        return self._slots

    @override
    @contextlib.contextmanager
    def updating(self, slot: OptimizerSlot) -> Generator[None]:
        self._active = (slot,)
        try:
            yield
        finally:
            self._active = self._slots

    @property
    @override
    def can_step_by_closure(self) -> bool:
        return self._new_scaler is None

    @property
    def _is_restricted(self) -> bool:
        return self._active is not self._slots

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        """The gradient scaler of the present update. Each starts with the same scale in each run."""
        if self._new_scaler is None:
            return None
        name = f"scaler.{self._active[0].label}" if self._is_restricted else "scaler"
        if name not in self._scalers:
            self._scalers[name] = copy.deepcopy(self._new_scaler)
        return self._scalers[name]

    @override
    def around_batch(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @override
    def backward(self, loss: Tensor) -> None:
        if (scaler := self._scaler) is not None:
            loss = scaler.scale(loss)
        trained = [p for p in all_parameters(self._active) if p.requires_grad] if self._is_restricted else None
        if trained != []:  # torch refuses an empty list: an update whose parameters are all frozen changes nothing
            loss.backward(inputs=trained)  # type: ignore[no-untyped-call]  # torch leaves it unannotated

    @override
    def stop_overlapping(self) -> None: ...

    @override
    def unscale_gradients(self) -> None:
        if (scaler := self._scaler) is not None:
            for slot in self._active:
                scaler.unscale_(slot.optimizer)

    @override
    def clip_norm(self, max_norm: float | Tensor) -> Tensor:
        parameters = all_parameters(self._active)
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        clip_known_norm(parameters, max_norm, norm)
        return norm

    @override
    def clip_value(self, max_value: float) -> None:
        # torch refuses parameters of which none has a gradient
        if given := [parameter for parameter in all_parameters(self._active) if parameter.grad is not None]:
            clip_grad_value_(given, max_value)

    @override
    def update(self, closure: Closure | None = None) -> bool:
        if (scaler := self._scaler) is None:
            happened = True
            for slot in self._active:
                if closure is None:  # a user's `step` may have no such parameter
                    slot.optimizer.step()
                else:
                    slot.optimizer.step(closure)  # type: ignore[arg-type]  # optimizers return the loss, or read it
        else:
            stepped = [step_scaled(scaler, slot.optimizer) for slot in self._active]
            scaler.update()
            happened = all(stepped)
        for slot in self._active:
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
        shared = {name: scaler.state_dict() for name, scaler in self._scalers.items()}
        return EngineState(get_weights(self._unwrapped_model), optimizers, shared)

    @override
    def load_state(self, state: EngineState) -> None:
        load_weights(self._unwrapped_model, state.weights, strict=False)
        for slot in self._slots:
            if slot.name in state.optimizers:
                load_optimizer_state(slot.optimizer, state.optimizers[slot.name])
        if self._new_scaler is not None:
            for name, saved in state.shared.items():
                self._scalers[name] = copy.deepcopy(self._new_scaler)
                self._scalers[name].load_state_dict(saved)


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
