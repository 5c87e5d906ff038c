"""The search for a learning rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from ptacc.errors import ModelError, OptionError
from ptacc.loop.evaluation import EvalData
from ptacc.loop.loop import TrainingLoop
from ptacc.run.step_result import StepResult
from ptacc.tuning.isolated import AnyLoop, search_copy
from ptacc.tuning.lr_curve import MIN_POINTS, DivergenceDetector, find_steepest, smoothed
from ptacc.types.aliases import BatchT, OutputT, RawT, SampleT
from ptacc.types.arguments import DataLoaderKwargs
from ptacc.validation import check_at_least, check_positive, with_install_note


@dataclass(frozen=True, repr=False)
class LearningRateSearch:
    """The result of a search for a learning rate, the same on every process.

    Args:
        rates: Learning rates of the first parameter group, from small to large.
        losses: For each rate, the loss after a step with it: the mean over the next step's items.
        stopped: Why the search ended before the largest rate, None if it did not.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    stopped: str | None = None

    @property
    def smoothed(self) -> tuple[float, ...]:
        """The losses, smoothed with their neighbours on both sides."""
        return smoothed(self.losses)

    @property
    def suggestion(self) -> float | None:
        """The rate at which the smoothed loss falls fastest; None if it does not clearly fall."""
        index = find_steepest(self.losses)
        return None if index is None else self.rates[index]

    def set_rate(self, optimizer: Optimizer) -> None:
        """Set the suggestion in the first parameter group, and scale the rates of the others by the same factor.

        Raises:
            OptionError: The search has no suggestion.
            ModelError: The learning rate of the first group is not above 0.
        """
        if self.suggestion is None:
            raise OptionError(
                f"{self!r} suggests no learning rate: the loss does not clearly fall. Check `losses`. Use more steps, "
                "larger batches, or other bounds."
            )
        for group, ratio in zip(optimizer.param_groups, relative_rates(optimizer), strict=True):
            set_group_rate(group, self.suggestion * ratio)

    def plot(self, path: str | Path) -> None:
        """Plot the losses over the rates to an image file, with the suggestion.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        with with_install_note("search.plot()", "ptacc[plot]"):
            from matplotlib.figure import Figure

        figure = Figure(layout="constrained")
        axes = figure.subplots()
        axes.semilogx(self.rates, self.losses, color="C0", alpha=0.35, label="loss")
        axes.semilogx(self.rates, self.smoothed, color="C0", label="smoothed")
        if self.suggestion is not None:
            axes.axvline(self.suggestion, color="C1", linestyle="--", label=f"suggestion {self.suggestion:.3g}")
        axes.set(xlabel="learning rate", ylabel="loss")
        axes.legend()
        figure.savefig(path)

    @override
    def __repr__(self) -> str:
        rates = self.rates
        tried = f"{len(rates)} rates from {rates[0]:.3g} to {rates[-1]:.3g}" if rates else "no rates"
        suggestion = "none" if self.suggestion is None else f"{self.suggestion:.3g}"
        return f"LearningRateSearch({tried}, suggestion {suggestion})"


@overload
def find_learning_rate(
    trainer: TrainingLoop[BatchT, OutputT, nn.Module, SampleT],
    train_dataset: EvalData[SampleT],
    *,
    min_lr: float = 1e-7,
    max_lr: float = 10.0,
    steps: int = 100,
    max_rise: float = 3.0,
    per_device_batch_size: int | None = None,
    train_dataloader_kwargs: DataLoaderKwargs | None = None,
    data_is_sharded: bool = False,
) -> LearningRateSearch: ...
@overload
def find_learning_rate(
    trainer: TrainingLoop[BatchT, OutputT, nn.Module, SampleT],
    train_dataset: EvalData[RawT],
    *,
    collate_fn: Callable[[list[RawT]], BatchT],
    min_lr: float = 1e-7,
    max_lr: float = 10.0,
    steps: int = 100,
    max_rise: float = 3.0,
    per_device_batch_size: int | None = None,
    train_dataloader_kwargs: DataLoaderKwargs | None = None,
    data_is_sharded: bool = False,
) -> LearningRateSearch: ...
def find_learning_rate(
    trainer: AnyLoop,
    train_dataset: Any,
    *,
    collate_fn: Any = None,
    min_lr: float = 1e-7,
    max_lr: float = 10.0,
    steps: int = 100,
    max_rise: float = 3.0,
    per_device_batch_size: int | None = None,
    train_dataloader_kwargs: DataLoaderKwargs | None = None,
    data_is_sharded: bool = False,
) -> LearningRateSearch:
    """Train for a few steps with increasing learning rates, and find the rate at which the loss falls fastest.

    Afterwards the weights, the optimizer, the random streams and the samplers have their former state: a later run is
    the same to the last bit as one without a search. No callback is called, and nothing is scheduled, evaluated or
    saved. All processes call this function, and get the same result.

    Args:
        trainer: The trainer, ready to train.
        train_dataset: As for `train`.
        collate_fn: As for `train`.
        min_lr: The first rate of the first parameter group, above 0. The other groups keep their ratio to it.
        max_lr: The last rate, above `min_lr`.
        steps: How many rates to try, at least 10.
        max_rise: The search ends once the running mean of the loss has risen above its minimum by this many times its
            first value. A loss that is NaN or infinite ends it too.
        per_device_batch_size: As for `train`. A rate suits one batch size.
        train_dataloader_kwargs: As for `train`.
        data_is_sharded: As for `train`.

    Raises:
        OptionError: A number is out of its range.
        ModelError: The learning rate of the optimizer's first group is not above 0, so the others have no ratio to it.
        NestedRunError: The trainer is running.

    Source: Smith, 2015, https://arxiv.org/abs/1506.01186

    Example:
        >>> from ptacc import Trainer
        >>> from ptacc.testing import iris, iris_parts
        >>> search = find_learning_rate(Trainer(**iris_parts()), iris(), per_device_batch_size=16)
        >>> 0.001 < search.suggestion < 1.0
        True
    """
    owner = "find_learning_rate"
    check_at_least(owner, "steps", steps, MIN_POINTS)
    for name, value in (("min_lr", min_lr), ("max_lr", max_lr), ("max_rise", max_rise)):
        check_positive(owner, name, value)
    if max_lr <= min_lr:
        raise OptionError(f"{owner}(max_lr={max_lr!r}): must be above min_lr, which is {min_lr!r}.")
    loader_kwargs = train_dataloader_kwargs or {}
    samplers = loader_kwargs.get("sampler"), loader_kwargs.get("batch_sampler")
    with search_copy(trainer, train_dataset, *samplers) as trial:
        sweep = Sweep(trial, tuple(np.geomspace(min_lr, max_lr, steps).tolist()), DivergenceDetector(max_rise))
        vars(trial)["on_gradients_ready"] = sweep.on_gradients_ready
        trial.train(
            train_dataset,
            max_steps=steps + 1,  # the last step only measures the loss after the largest rate
            per_device_batch_size=per_device_batch_size,
            train_dataloader_kwargs=loader_kwargs,
            data_is_sharded=data_is_sharded,
            stop_check_every=1,
            collate_fn=collate_fn,
        )
    return sweep.result()


class Sweep:
    """Sets the learning rate of each step before its update, and records the losses until they diverge."""

    def __init__(self, trial: AnyLoop, rates: tuple[float, ...], detector: DivergenceDetector) -> None:
        self._trial, self._rates, self._detector = trial, rates, detector
        self._hook = trial.on_gradients_ready
        self._ratios = [relative_rates(slot.optimizer) for slot in trial.optimizer_slots()]
        self._losses: list[float] = []
        self._stopped: str | None = None
        self._is_over = False

    def on_gradients_ready(self, step: StepResult) -> None:
        """Record the loss of a step, and set the rate of its update."""
        self._hook(step)
        if self._is_over:  # the processes have not agreed to stop yet
            return
        index = step.step - 1
        distributed = self._trial.distributed
        loss = distributed.sum([float(step.loss)])[0] / distributed.world_size
        self._losses[index:] = [loss]  # a step is repeated if the gradient scaler skipped its update
        if self._detector.add(loss):
            place = f"after a step with {self._rates[index - 1]:.3g}" if index else "before the first step"
            self._stopped = f"the loss is {loss:.4g} {place}"
        if self._stopped or index == len(self._rates):
            self._is_over = True
            self._trial.stop(self._stopped or "every rate was tried")
            return
        for slot, ratios in zip(self._trial.run.engine.slots, self._ratios, strict=True):
            for group, ratio in zip(slot.optimizer.param_groups, ratios, strict=True):
                set_group_rate(group, self._rates[index] * ratio)

    def result(self) -> LearningRateSearch:
        """Return the rates, each with the loss that was measured after its step."""
        losses = self._losses[1:]
        return LearningRateSearch(self._rates[: len(losses)], tuple(losses), self._stopped)


def relative_rates(optimizer: Optimizer) -> list[float]:
    """Return the learning rates of all parameter groups, as multiples of the first group's."""
    rates: list[Any] = [group.get("lr") for group in optimizer.param_groups]
    if not all(isinstance(rate, int | float | Tensor) for rate in rates) or not rates[0] > 0:
        raise ModelError(
            f"The learning rates of {type(optimizer).__name__} are {rates}: the first has to be above 0, because the "
            "others are multiples of it. Put a group with a learning rate first."
        )
    return [float(rate) / float(rates[0]) for rate in rates]


def set_group_rate(group: dict[str, Any], rate: float) -> None:
    """Set the learning rate of a parameter group. A rate that is a tensor is replaced, and not changed in place."""
    group["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], Tensor) else rate
