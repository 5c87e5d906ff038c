"""The engine for DeepSpeed's ZeRO.

```
start   record the original model -> remove the optimizer's state -> DeepSpeed partitions the model
        -> load this rank's partition of the optimizer's state
step    the backward pass of the last batch averages the gradients, and reduces them to each rank's partition
end     gather weights and optimizer state into the user's own parameters and optimizer; undo all other changes
```

The trainer itself accumulates, clips and scales. DeepSpeed is configured for steps of one batch without clipping;
`around_batch` sets its accumulation boundary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Sequence

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from typing_extensions import override

from ptacc.engines.base import Closure, EngineState, OptimizerSlot
from ptacc.engines.common import OriginalModel, broadcast_buffers
from ptacc.engines.deepspeed.checks import check_model, check_optimizer, init_distributed
from ptacc.engines.deepspeed.config import ZeroConfig
from ptacc.engines.deepspeed.stages import STAGES, Stage3
from ptacc.engines.default import TorchEngine
from ptacc.engines.reduction import ReductionCheck
from ptacc.errors import CheckpointError, ModelError
from ptacc.model.state_dict import canonical_name, get_weights, load_optimizer_state, load_weights, make_placeholder
from ptacc.types.protocols import AcceleratorProtocol, StateDict

LATE_ATTRIBUTES = ("ds_", "_ds_", "_z3_", "applied_pre_backward")
"""Prefixes of the attributes that DeepSpeed adds as late as in the first forward pass."""
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


class DeepSpeedEngine(TorchEngine):
    """Trains a model that DeepSpeed partitions, with the user's own optimizer, which steps on the partitions."""

    can_update_separately = False
    can_unfreeze = False

    def __init__(
        self,
        accelerator: AcceleratorProtocol,
        model: nn.Module,
        slots: Sequence[OptimizerSlot],
        config: ZeroConfig,
        layout: str,
    ) -> None:
        """Partition a model and the state of its optimizer. A collective.

        Args:
            accelerator: The accelerator of the launch.
            model: The user's model.
            slots: The one optimizer.
            config: The stage and DeepSpeed's configuration.
            layout: Stage and number of ranks, which have to be the same to load an optimizer's partitions.

        Raises:
            LaunchError: DeepSpeed cannot run here.
            ModelError: DeepSpeed does not support the model or the optimizer.
        """
        (slot,) = slots
        check_model(model, config)
        check_optimizer(slot, config)
        init_distributed(accelerator.device)
        self._layout, self._optimizer, settings = layout, slot.optimizer, config.to_deepspeed()
        self._groups = [list(group["params"]) for group in slot.optimizer.param_groups]
        self._original, self._with_gradient = OriginalModel(model, ("deepspeed",), LATE_ATTRIBUTES), set[Tensor]()
        # ZeRO 3 replaces each module's dictionary of parameters by one that gathers them.
        self._parameter_tables = {module: module._parameters for module in model.modules()}  # noqa: SLF001
        states = dict(slot.optimizer.state)
        self._frozen_states = {p: state for p, state in states.items() if not p.requires_grad}
        slot.optimizer.state.clear()
        if config.stage == 3:  # partition one weight at a time: the model may be larger than the device
            dtype = torch.bfloat16 if config.has_bf16_weights else torch.float32
            deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=dtype)
        # Accelerate prepares it for the device, the precision and the compiler.
        super().__init__(accelerator, model, slots)
        self._reduction = ReductionCheck(model, self._slots)
        self._engine, *_ = deepspeed.initialize(model=self._model, optimizer=slot.optimizer, config=settings)
        self._model = self._engine
        self._stage = STAGES[config.stage](self._engine, slot, self._groups)
        self._stage.prepare(model)
        self._stage.scatter_optimizer_state(states)
        self._original.record_added_attributes()
        broadcast_buffers(model)
        self._names: dict[Tensor, str] = {p: canonical_name(name) for name, p in model.named_parameters()}
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._with_gradient.add)  # type: ignore[no-untyped-call]
            for p in self._stage.trained
        ]

    # ---- a step

    @property
    @override
    def can_step_by_closure(self) -> bool:
        return False

    @override
    @contextlib.contextmanager
    def around_batch(self, *, is_last: bool) -> Generator[None]:
        if hasattr(self._engine.optimizer, "clear_backward_seen_flag"):
            # DeepSpeed does so when its engine is called, which a user's step need not do.
            self._engine.optimizer.clear_backward_seen_flag()
        self._engine.set_gradient_accumulation_boundary(is_last)
        yield

    @override
    def backward(self, loss: Tensor) -> None:
        """Run DeepSpeed's backward pass.

        Raises:
            ModelError: The loss does not depend on all trained parameters, and gradients are partitioned.
        """
        self._with_gradient.clear()
        self._engine.backward(loss, scale_wrt_gas=False)
        if self._stage.is_partitioned and len(self._with_gradient) < len(self._stage.trained):
            missing = [self._names[p] for p in self._stage.trained if p not in self._with_gradient]
            raise ModelError(
                f"The loss does not depend on {', '.join(missing)}. ZeRO reduces gradients in the order in which they "
                "are computed, and would add gradients of different parameters if ranks use different ones. Freeze "
                "the unused parameters, or use zero_stage=0."
            )

    @override
    @torch.no_grad()
    def clip_norm(self, max_norm: float | Tensor) -> Tensor:
        gradients = self._stage.gradients()
        total = torch.zeros((), device=self._accelerator.device)
        if gradients:
            norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
            total = torch.stack(norms).square().sum().to(total.device)
        if self._stage.is_partitioned:
            dist.all_reduce(total)
        norm = total.sqrt()
        if gradients and (isinstance(max_norm, Tensor) or not math.isinf(max_norm)):
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as in torch.nn.utils.clip_grad_norm_
            torch._foreach_mul_(gradients, factor.to(gradients[0].device))  # pyright: ignore[reportPrivateImportUsage]
            self._stage.set_gradients(gradients)
        return norm

    @override
    @torch.no_grad()
    def clip_value(self, max_value: float) -> None:
        if gradients := self._stage.gradients():
            torch._foreach_clamp_min_(gradients, -max_value)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_clamp_max_(gradients, max_value)  # pyright: ignore[reportPrivateImportUsage]
            self._stage.set_gradients(gradients)

    @override
    def unscale_gradients(self) -> None:
        """Check that no parameter was unfrozen: DeepSpeed would not average its gradient. There is no scaler."""
        self._reduction.check()

    @override
    def update(self, closure: Closure | None = None) -> bool:
        """Step, clear the gradients, and broadcast rank 0's buffers.

        Some stages do not change the weights if gradients are not finite. Such a step counts as well, so that its loss
        is reported.

        Raises:
            ModelError: A parameter group was added to the optimizer during the run.
        """
        if len(self._optimizer.param_groups) != len(self._groups):
            raise ModelError(
                "A parameter group was added to the optimizer during the run, and DeepSpeed partitions parameters at "
                "its start. Add the group before train(), or train without DeepSpeed."
            )
        with self._stage.stepping():
            self._engine.step()
        broadcast_buffers(self._unwrapped_model)
        return True

    # ---- the state: full weights on rank 0, and each rank's partition of the optimizer's state

    @override
    def get_state(self) -> EngineState:
        counters = {name: getattr(self._engine, name) for name in COUNTERS}
        own: StateDict = {"layout": self._layout, "counters": counters, "groups": self._group_names()}
        optimizer = self._optimizer.state_dict()
        if self._stage.is_partitioned:
            return EngineState(self._gather_weights(), own={**own, "optimizer": optimizer})
        return EngineState(self._gather_weights(), {self._slots[0].name: optimizer}, own=own)

    def _gather_weights(self) -> StateDict:
        weights = get_weights(self._unwrapped_model)
        gathered: dict[Parameter, Tensor] = {}  # once for all names of a tied weight
        for name, parameter in self._unwrapped_model.named_parameters(remove_duplicate=False):
            is_local = not isinstance(self._stage, Stage3) and not self._stage.has_master_weight(parameter)
            if canonical_name(name) not in weights or is_local:
                continue
            if parameter not in gathered:
                full = self._stage.gather_weight(parameter)
                gathered[parameter] = full.to("cpu") if dist.get_rank() == 0 else make_placeholder(full)
            weights[canonical_name(name)] = gathered[parameter]
        return weights

    @override
    @torch.no_grad()
    def load_state(self, state: EngineState) -> None:
        """Load full weights, and this rank's partition of the optimizer's state.

        Raises:
            CheckpointError: The partition is of another stage or another number of ranks.
        """
        parameters = self._unwrapped_model.named_parameters(remove_duplicate=False)
        by_name = {canonical_name(name): parameter for name, parameter in parameters}
        weights = {by_name[name]: weight for name, weight in state.weights.items() if name in by_name}
        self._stage.set_weights(weights)
        buffers = {name: value for name, value in state.weights.items() if name not in by_name}
        load_weights(self._unwrapped_model, buffers, strict=False)
        if not self._stage.is_partitioned and self._slots[0].name in state.optimizers:
            load_optimizer_state(self._optimizer, state.optimizers[self._slots[0].name])
        if state.own:
            self._load_own(state.own)

    def _load_own(self, own: StateDict) -> None:
        if own.get("layout") != self._layout:
            raise CheckpointError(
                f"The optimizer's state was saved under {own.get('layout')!r}, and this is {self._layout!r}: its "
                "partitions do not fit. Load the weights alone by load_checkpoint(weights_only=True)."
            )
        if self._stage.is_partitioned and own.get("groups") != self._group_names():
            raise CheckpointError(
                "The optimizer's parameters are in another order than in the checkpoint, whose partitions contain them "
                "in that order. Create the model and the optimizer in the same order, or load the weights alone by "
                "load_checkpoint(weights_only=True)."
            )
        for name, value in own["counters"].items():
            setattr(self._engine, name, value)
        if self._stage.is_partitioned:
            load_optimizer_state(self._optimizer, own["optimizer"])

    def _group_names(self) -> list[list[str]]:
        return [[self._names[parameter] for parameter in group] for group in self._groups]

    # ---- the end

    @override
    @torch.no_grad()
    def release(self) -> None:
        states = self._stage.gather_optimizer_state(self._original.devices)
        for hook in self._hooks:
            hook.remove()
        for parameter, device in self._original.devices.items():
            weight = self._stage.gather_weight(parameter).detach()
            parameter.data, parameter.grad = weight.to(device, torch.float32, copy=True), None  # see `check_model`
        for module, own in self._parameter_tables.items():
            own.update(vars(module)["_parameters"])
            vars(module)["_parameters"] = own
        self._original.restore()
        self._engine.destroy()
        # Its finalizer destroys the optimizer again. During a later run that would unlink the parameters' state.
        self._engine.optimizer = None
        for group, parameters in zip(self._optimizer.param_groups, self._groups, strict=True):
            group["params"] = parameters
        self._optimizer.state.clear()
        self._optimizer.state.update(self._frozen_states | states)
        self._model = self._unwrapped_model
        del self._engine, self._stage  # frees the partitions
