"""FSDP2 for steps that call methods and submodules of the model, and not only the model itself.

FSDP2 gathers parameters that belong to no unit before the forward pass of the model, its root. So the root's forward
pass is made to last from the start of a batch to its loss: within it a step may call anything outside of the units.
torch's `register_fsdp_forward_method` does not suffice. It supports no method that `forward` calls as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from weakref import ref

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

from ptacc.errors import ModelError
from ptacc.model.wrapping import call_contexts

MIXED_TENSORS = "mixed torch.Tensor and DTensor"
"""In torch's error for a call that uses parameters which are not gathered."""


class RootForward:
    """Makes a block one forward pass of the root: that of a batch, or the step of an evaluation.

    Calls of the model within the block only cast inputs and outputs. Methods of units other than `forward` cannot be
    called, nor any methods after a gradient that the block computes itself: FSDP2 then frees all parameters.

    Args:
        model: The root.
    """

    def __init__(self, model: FSDPModule) -> None:
        assert isinstance(model, nn.Module)
        self._model, self._is_open = ref(model), False  # weak: it is a value in a dictionary with weak keys
        get_state(model)._lazy_init()  # noqa: SLF001  # otherwise a unit that is called first would become the root
        call_contexts[model] = self
        # After a forward pass FSDP2 leaves the root gathered, for a backward pass that evaluations do not make.
        model.register_forward_hook(
            lambda module, *_: None if torch.is_grad_enabled() or self._is_open else reshard(module)
        )

    @contextlib.contextmanager
    def __call__(self) -> Generator[None]:
        """Gather the root's parameters for a block. A collective.

        Raises:
            ModelError: The block used parameters of a unit outside of its forward.
        """
        if self._is_open:
            yield
            return
        model, self._is_open = self._model(), True
        assert isinstance(model, nn.Module)
        state = get_state(model)
        try:
            state._pre_forward(model, (), {})  # noqa: SLF001
            # The state in which FSDP2 does nothing more for calls of the root: it is for recomputed activations.
            state._training_state = TrainingState.PRE_BACKWARD  # noqa: SLF001
            yield
            if torch.is_grad_enabled() and state._training_state != TrainingState.IDLE:  # noqa: SLF001
                state._root_post_backward_final_callback()  # noqa: SLF001  # the backward pass was made by hand
        except RuntimeError as error:
            if MIXED_TENSORS not in str(error):
                raise
            raise ModelError(
                "A step used parameters of a unit of FSDP2 outside of the unit's forward, for example in another of "
                "its methods. They are gathered for calls of the unit only. Call the unit itself, or leave it out of "
                "fsdp_wrap. (FSDP2 also frees all parameters when a step computes a gradient itself: after that, call "
                "the model, not its methods.)"
            ) from error
        finally:
            if self._is_open or state._training_state != TrainingState.IDLE:  # noqa: SLF001
                abandon(state)
                reshard(model)
            self._is_open = False

    def end(self, loss: Tensor) -> Tensor:
        """End the forward pass: return the loss, whose backward pass reduces the gradients."""
        model, self._is_open = self._model(), False
        assert isinstance(model, nn.Module)
        state = get_state(model)
        state._training_state = TrainingState.FORWARD  # noqa: SLF001
        output: Tensor = state._post_forward(model, (), loss)  # noqa: SLF001
        return output


def get_state(model: nn.Module) -> FSDPState:
    """Return what FSDP2 holds about a unit."""
    assert isinstance(model, FSDPModule)
    return model._get_fsdp_state()  # noqa: SLF001  # torch has no public way


def abandon(state: FSDPState) -> None:
    """Forget a forward pass of the root without a backward pass."""
    state._training_state, state._state_ctx.iter_forward_root = TrainingState.IDLE, None  # noqa: SLF001
    if (group := state._fsdp_param_group) is not None:  # noqa: SLF001
        group._training_state = TrainingState.IDLE  # noqa: SLF001


def reshard(model: nn.Module) -> None:
    """Free the gathered parameters of all FSDP2 units."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
