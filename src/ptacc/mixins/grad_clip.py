"""Gradient clipping."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from typing_extensions import override

from ptacc.core.hooks import Mixin
from ptacc.engines.default import clear_gradients
from ptacc.errors import OptionError
from ptacc.loop.updates import MultiUpdateLoop
from ptacc.run.spikes import RunningDeviation, SpikeGuard
from ptacc.run.state import StateKey
from ptacc.run.step_result import StepResult
from ptacc.validation import check_positive

GRADIENT_NORMS: StateKey[RunningDeviation] = StateKey("gradient_norms")
SPIKES: StateKey[SpikeGuard] = StateKey("spikes")


class GradClipMixin(Mixin):
    """Clips gradients before each optimizer step, after accumulation and unscaling.

    Options:
        max_grad_norm: Maximum 2-norm of all gradients together. The norm before clipping is logged as `grad_norm`;
            `math.inf` logs it without clipping.
        max_grad_deviations: Clip spikes: the maximum norm is the running mean of the norms plus this many of their
            standard deviations, from the 26th step on. Nothing is read from the device. `grad_spikes` is logged: 1
            for a spike, so that its mean is their share.
        max_grad_value: Maximum magnitude of each entry of the gradients, applied before the norm is computed.
        max_loss_deviations: With another `spike_action` than `"clip"`, a loss so many standard deviations above its
            running mean is a spike, too. The share of such steps is logged as `loss_spikes`.
        spike_action: What to do at a spike: `"clip"` its gradients; `"skip"` the update, so that weights and optimizer
            state stay as they are; or `"stop"` the run, without the update. Both read from the device in each step.

    Hooks: `on_run_start`, `on_gradients_ready`, `train_value_names`.

    Combines with: everything.

    Example:
        >>> from ptacc import GradClipMixin, Trainer
        >>> class MyTrainer(GradClipMixin, Trainer):
        ...     max_grad_norm = 1.0
    """

    max_grad_norm: float | None = None
    max_grad_deviations: float | None = None
    max_grad_value: float | None = None
    max_loss_deviations: float | None = None
    spike_action: Literal["clip", "skip", "stop"] = "clip"

    @override
    def check_options(self) -> None:
        owner, advice = type(self).__name__, "Leave it out to disable clipping."
        if self.max_grad_norm is not None and self.max_grad_norm != math.inf:
            check_positive(owner, "max_grad_norm", self.max_grad_norm, advice)
        if self.max_grad_value is not None:
            check_positive(owner, "max_grad_value", self.max_grad_value, advice)
        for name in ("max_grad_deviations", "max_loss_deviations"):
            if (deviations := getattr(self, name)) is not None:
                check_positive(owner, name, deviations, advice)
                if isinstance(self, MultiUpdateLoop):
                    raise OptionError(f"{owner}({name}=...): needs one update per step. Set max_grad_norm.")
        check_spike_action(self)

    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        if self.spike_action != "clip":
            deviations = {"loss": self.max_loss_deviations, "grad_norm": self.max_grad_deviations}
            self.run[SPIKES] = SpikeGuard({name: most for name, most in deviations.items() if most is not None})
        elif self.max_grad_deviations is not None:
            self.run[GRADIENT_NORMS] = RunningDeviation(self.device)

    @override
    def on_gradients_ready(self, step: StepResult) -> None:
        super().on_gradients_ready(step)
        if self.max_grad_value is not None:
            self.run.engine.clip_value(self.max_grad_value)
        if self.spike_action != "clip":
            skip_spike(self, step)
        elif self.max_grad_deviations is not None:
            norms = self.run[GRADIENT_NORMS]
            limit = norms.limit(self.max_grad_deviations)
            norm = self.run.engine.clip_norm(
                limit if self.max_grad_norm is None else limit.clamp(max=self.max_grad_norm)
            )
            norms.add(norm, limit)
            step.logged |= {"grad_norm": norm, "grad_spikes": (norm > limit).to(norm.dtype)}
        elif self.max_grad_norm is not None:
            step.logged["grad_norm"] = self.run.engine.clip_norm(self.max_grad_norm)

    @override
    def train_value_names(self) -> frozenset[str]:
        names = {"grad_norm"} if self.max_grad_norm is not None else set[str]()
        names |= {"grad_norm", "grad_spikes"} if self.max_grad_deviations is not None else set()
        names |= {"loss_spikes"} if self.max_loss_deviations is not None else set()
        return super().train_value_names() | names


def check_spike_action(trainer: GradClipMixin) -> None:
    """Raise `OptionError` for an unknown action, and for one that does not fit the other options."""
    action, loss = trainer.spike_action, trainer.max_loss_deviations
    owner = f"{type(trainer).__name__}(spike_action={action!r})"
    if action not in ("clip", "skip", "stop"):
        raise OptionError(f'{owner}: must be "clip", "skip" or "stop".')
    if action == "clip" and loss is not None:
        raise OptionError(f'{owner}: a loss cannot be clipped. Set "skip" or "stop" with max_loss_deviations={loss}.')
    if action != "clip" and loss is None and trainer.max_grad_deviations is None:
        raise OptionError(f"{owner}: no spike is defined. Set max_grad_deviations or max_loss_deviations.")
    if action != "clip" and trainer.steps_by_closure:
        raise OptionError(f'{owner}: an optimizer with a closure computes its own gradients. Use "clip".')


def skip_spike(trainer: GradClipMixin, step: StepResult) -> None:
    """Discard the gradients of a step that is a spike, and stop the run if that is the action. A collective."""
    run, values = trainer.run, {"loss": step.loss}
    if trainer.max_grad_norm is not None or trainer.max_grad_deviations is not None:
        norm = run.engine.clip_norm(math.inf if trainer.max_grad_norm is None else trainer.max_grad_norm)
        values["grad_norm"] = step.logged["grad_norm"] = norm
    read = torch.stack([value.to(step.loss.device) for value in values.values()]).tolist()
    means = [value / run.distributed.world_size for value in run.distributed.sum(read)]
    spikes = run[SPIKES].find(dict(zip(values, means, strict=True)))
    if trainer.max_loss_deviations is not None:
        step.logged["loss_spikes"] = float("loss" in spikes)
    if trainer.max_grad_deviations is not None:
        step.logged["grad_spikes"] = float("grad_norm" in spikes)
    if not spikes:
        return
    for slot in run.engine.slots:
        clear_gradients(slot.optimizer)
    if trainer.spike_action == "stop":
        reason = f"spike at step {step.step}: {', '.join(spikes.values())}"
        run.stopping.request(reason, replace(run.progress, steps=step.step), is_lasting=True)
