"""DeepSpeed's engine, driven by ptacc's own windows.

```
begin   what was plain is noted -> the optimizer's state is taken -> DeepSpeed deals out -> it is given back in parts
step    gradients are averaged, and dealt out, within the backward pass of the step's last batch
end     parts -> whole tensors, in the user's own parameters and optimizer; the model is what it was before
```

Windows, clipping and the scale of the loss are ptacc's own: DeepSpeed is told of steps of one batch, whose last batch
is the last of ptacc's, and of no clipping.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from typing_extensions import override

from ptacc.engines.base import OptimizerSlot
from ptacc.engines.common import broadcast_buffers
from ptacc.engines.ddp import TorchEngine
from ptacc.engines.deepspeed.checks import check_model, check_optimizer, init_distributed
from ptacc.engines.deepspeed.config import ZeroConfig
from ptacc.engines.deepspeed.original_model import OriginalModel
from ptacc.engines.deepspeed.stages import STAGES
from ptacc.errors import CheckpointError, ModelError
from ptacc.model.state_dict import canonical_name, weight_differences, load_optimizer_state, load_weights
from ptacc.types.protocols import AcceleratorProtocol, StateDict

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


class DeepSpeedEngine(TorchEngine):
    """A model that DeepSpeed deals out by ZeRO, and the user's own optimizer, which works on parts meanwhile."""

    def __init__(
        self,
        accelerator: AcceleratorProtocol,
        model: nn.Module,
        slots: Sequence[OptimizerSlot],
        config: ZeroConfig,
        where: str,
    ) -> None:
        """Deal a model out, and what its optimizer keeps. A collective.

        Args:
            accelerator: The device.
            model: The bare model.
            slots: The optimizers, of which there is one.
            config: The stage, and all that DeepSpeed is to know.
            where: What checkpoints say of the stage and the processes.

        Raises:
            LaunchError: DeepSpeed cannot run here.
            ModelError: A model or an optimizer with which it would compute something else, in silence.
        """
        (slot,) = slots
        check_model(model, config)
        check_optimizer(slot.optimizer, config)
        init_distributed(accelerator.device)
        self._where, self._optimizer, settings = where, slot.optimizer, config.to_deepspeed()
        self._groups = [list(group["params"]) for group in slot.optimizer.param_groups]
        self._before, self._grown = OriginalModel(model), set[int]()
        states = dict(slot.optimizer.state)
        self._kept = {p: state for p, state in states.items() if not p.requires_grad}
        slot.optimizer.state.clear()
        if config.stage == 3:  # one weight at a time: the whole model may be larger than the device
            dtype = torch.bfloat16 if config.has_bf16_weights else torch.float32
            deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=dtype)
        # For the device, the precision, and the compiler. It wraps nothing: DDP is for models that are trained whole.
        super().__init__(accelerator, model, slots, in_replicas=False)
        self._engine, *_ = deepspeed.initialize(model=self._model, optimizer=slot.optimizer, config=settings)
        self._wrapped: nn.Module = self._engine
        self._zero = STAGES[config.stage](self._engine, slot, self._groups)
        self._zero.begin(model)
        self._zero.give_states(states)
        self._before.record_added_attributes()
        broadcast_buffers(model)
        self._names = {id(p): canonical_name(name) for name, p in model.named_parameters()}
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._note_gradient)  # type: ignore[no-untyped-call]
            for p in self._zero.trained
        ]

    # ---- a step

    @property
    @override
    def model(self) -> nn.Module:
        """The model as steps call it."""
        return self._wrapped

    @override
    @contextlib.contextmanager
    def around_batch(self, *, is_last: bool) -> Iterator[None]:
        """Let gradients be averaged in the last batch alone."""
        if hasattr(self._engine.optimizer, "clear_backward_seen_flag"):
            # DeepSpeed counts the batch when it is called, which a step may go around.
            self._engine.optimizer.clear_backward_seen_flag()
        self._engine.set_gradient_accumulation_boundary(is_last)
        yield

    @override
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`.

        Raises:
            ModelError: It does not depend on all that is trained.
        """
        self._grown.clear()
        self._engine.backward(loss, scale_wrt_gas=False)
        if self._zero.deals_gradients and len(self._grown) < len(self._zero.trained):
            missing = [self._names.get(id(p), "?") for p in self._zero.trained if id(p) not in self._grown]
            raise ModelError(
                f"The loss does not depend on {', '.join(missing)}. ZeRO adds gradients up in the order in which they "
                "come, and would add those of different parameters where processes use different ones. Freeze what "
                "takes no part, or use zero_stage=0."
            )

    def _note_gradient(self, parameter: Tensor) -> None:
        self._grown.add(id(parameter))

    @override
    def unscale_gradients(self) -> None:
        """Do nothing: they were averaged within the last backward pass."""

    @override
    @torch.no_grad()
    def clip_norm(self, max_norm: float) -> Tensor:
        """Scale the gradients to a norm of at most `max_norm`, and return the norm they had."""
        gradients = self._zero.gradients()
        total = torch.zeros((), device=self._accelerator.device)
        if gradients:
            norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
            total = torch.stack(norms).square().sum().to(total.device)
        if self._zero.deals_gradients:
            dist.all_reduce(total)
        norm = total.sqrt()
        if gradients and not math.isinf(max_norm):
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's own
            torch._foreach_mul_(gradients, factor.to(gradients[0].device))  # pyright: ignore[reportPrivateImportUsage]
            self._zero.set_gradients(gradients)
        return norm

    @override
    @torch.no_grad()
    def clip_value(self, max_value: float) -> None:
        """Clamp each entry of the gradients."""
        if gradients := self._zero.gradients():
            torch._foreach_clamp_min_(gradients, -max_value)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_clamp_max_(gradients, max_value)  # pyright: ignore[reportPrivateImportUsage]
            self._zero.set_gradients(gradients)

    @override
    def update(self) -> bool:
        """Update the weights, clear the gradients, and give all processes rank 0's buffers, as DDP does.

        Where gradients are no numbers, some stages leave the weights as they are. The step counts nevertheless, so
        that what it reports is seen.
        """
        with self._zero.updating():
            self._engine.step()
        broadcast_buffers(self._bare_model)
        return True

    @override
    def sync_buffers(self) -> None:
        """Do nothing: each update has levelled the buffers."""

    # ---- what a checkpoint holds: whole weights, and each process's part of the optimizer's state

    @override
    def weights(self) -> StateDict:
        """Return the model's tensors. Those that are put together for it rank 0 alone has; others have their form."""
        weights = super().weights()
        whole: dict[Parameter, Tensor] = {}  # one for all names of a weight
        for name, parameter in self._bare_model.named_parameters(remove_duplicate=False):
            if canonical_name(name) in weights and (self._is_sharded or self._zero.has_masters(parameter)):
                if parameter not in whole:
                    whole[parameter] = to_rank_0(self._zero.whole(parameter))
                weights[canonical_name(name)] = whole[parameter]
        return weights

    @property
    def _is_sharded(self) -> bool:
        return isinstance(self._zero, STAGES[3])

    @override
    @torch.no_grad()
    def load_weights(self, weights: StateDict, *, strict: bool = True) -> None:
        """Put whole weights back, which every process has."""
        mine = self.weights()
        if strict and (different := sorted(weight_differences(mine, weights))):
            raise CheckpointError("The weights are of another model:\n  " + "\n  ".join(different))
        fitting = {name: self.localize(weights[name]) for name in mine if name in weights}
        parameters = dict(self._bare_model.named_parameters(remove_duplicate=False))
        by_name = {canonical_name(name): parameter for name, parameter in parameters.items()}
        self._zero.set_weights({by_name[name]: value for name, value in fitting.items() if name in by_name})
        load_weights(self._bare_model, {n: v for n, v in fitting.items() if n not in by_name}, strict=False)

    @override
    def held_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """Iterate over what this process holds of each parameter."""
        return ((canonical_name(name), self._zero.held(p)) for name, p in self._bare_model.named_parameters())

    @override
    def optimizer_states(self) -> Mapping[str, StateDict]:
        """Return the state of an optimizer that is the same on every process."""
        return {} if self._zero.deals_gradients else super().optimizer_states()

    @override
    def own_state_dict(self) -> StateDict:
        """Return this process's part of the optimizer's state, and what DeepSpeed counts."""
        counters = {name: getattr(self._engine, name) for name in COUNTERS}
        part = {"optimizer": self._optimizer.state_dict()} if self._zero.deals_gradients else {}
        return {"where": self._where, "counters": counters} | part

    @override
    def load_own_state_dict(self, state_dict: StateDict) -> None:
        """Take over this process's part of the optimizer's state.

        Raises:
            CheckpointError: It is of another stage, or of another number of processes.
        """
        if state_dict.get("where") != self._where:
            raise CheckpointError(
                f"The optimizer's state was saved under {state_dict.get('where')!r}, and this is {self._where!r}: the "
                "parts do not fit. Load the weights alone by load_checkpoint(weights_only=True)."
            )
        for name, value in state_dict["counters"].items():
            setattr(self._engine, name, value)
        if self._zero.deals_gradients:
            load_optimizer_state(self._optimizer, state_dict["optimizer"])

    # ---- the end

    @override
    def release(self) -> None:
        """Have the user's model and optimizer plain again, with all that was learnt. A collective."""
        states = self._zero.take_states(self._before.original_device)
        for hook in self._hooks:
            hook.remove()
        self._before.restore(self._zero.whole)
        self._engine.destroy()
        for group, parameters in zip(self._optimizer.param_groups, self._groups, strict=True):
            group["params"] = parameters
        self._optimizer.state.clear()
        self._optimizer.state.update(self._kept | states)
        self._wrapped = self._bare_model
        del self._engine, self._zero  # and with them the parts, which take as much memory as the whole


def to_rank_0(tensor: Tensor) -> Tensor:
    """Return a tensor on the host of rank 0, and elsewhere one of its form that takes no memory."""
    if dist.get_rank() == 0:
        return tensor.to("cpu")
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
