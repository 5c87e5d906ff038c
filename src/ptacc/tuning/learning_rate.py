"""The search for a learning rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from ptacc.errors import ModelError, OptionError
from ptacc.loop.evaluation import EvalData
from ptacc.loop.loop import TrainingLoop
from ptacc.run.history import StepResult
from ptacc.tuning.lr_curve import FEWEST, DivergenceDetector, geometric, smoothed, steepest
from ptacc.tuning.trial import AnyLoop, trial_of
from ptacc.types.aliases import BatchT, OutputT, RawT, SampleT
from ptacc.types.arguments import DataLoaderKwargs
from ptacc.validation import check_at_least, check_positive


@dataclass(frozen=True, repr=False)
class LearningRateSearch:
    """What a search for a learning rate saw, the same on every process.

    Args:
        rates: Learning rates of the first parameter group, from small to large.
        losses: For each rate, the loss right after a step with it: the mean over the next step's items.
        stopped: Why the search ended before the largest rate, None where it did not.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    stopped: str | None = None

    @property
    def smoothed(self) -> tuple[float, ...]:
        """The losses, each averaged with its neighbours on both sides."""
        return smoothed(self.losses)

    @property
    def suggestion(self) -> float | None:
        """The rate at which the smoothed loss falls fastest; None where it does not clearly fall."""
        place = steepest(self.losses)
        return None if place is None else self.rates[place]

    def set_rate(self, optimizer: Optimizer) -> None:
        """Give the first parameter group the suggestion, and the others their multiples of it.

        Raises:
            OptionError: There is no suggestion.
        """
        if self.suggestion is None:
            raise OptionError(
                f"{self!r} suggests no learning rate: the loss does not clearly fall. Look at `losses`; take more "
                "steps, larger batches, or other bounds."
            )
        for group, multiple in zip(optimizer.param_groups, relative_rates(optimizer), strict=True):
            put_rate(group, self.suggestion * multiple)

    def plot(self, path: str | Path) -> None:
        """Draw the losses over the rates to an image file, with the suggestion.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
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
        seen = f"{len(self.rates)} rates from {self.rates[0]:.3g} to {self.rates[-1]:.3g}" if self.rates else "no rates"
        found = "none" if self.suggestion is None else f"{self.suggestion:.3g}"
        return f"LearningRateSearch({seen}, suggestion {found})"


@overload
def find_learning_rate(
    trainer: TrainingLoop[BatchT, OutputT, SampleT],
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
    trainer: TrainingLoop[BatchT, OutputT, SampleT],
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
    collate_fn: Callable[[list[Any]], Any] | None = None,
    min_lr: float = 1e-7,
    max_lr: float = 10.0,
    steps: int = 100,
    max_rise: float = 3.0,
    per_device_batch_size: int | None = None,
    train_dataloader_kwargs: DataLoaderKwargs | None = None,
    data_is_sharded: bool = False,
) -> LearningRateSearch:
    """Train for a few steps with ever larger learning rates, and see at which of them the loss falls fastest.

    This is no training: afterwards the weights, the optimizer, the random streams and the samplers are what they were,
    and a run after it is the same to the last bit as one without. Callbacks hear nothing, nothing is scheduled,
    evaluated or saved. All processes call it, and find the same.

    A loss tells of the rate of the step before it, and is paired with that one.

    Args:
        trainer: The trainer, ready to train.
        train_dataset: As for `train`.
        collate_fn: As for `train`.
        min_lr: The first learning rate, above 0: that of the first parameter group. The others keep their ratio to it.
        max_lr: The last one, above `min_lr`.
        steps: How many rates to try, at least 10.
        max_rise: End once the loss, averaged over some steps, is above its lowest by this many times its first value.
            A loss that is no number ends it, too.
        per_device_batch_size: As for `train`: a rate suits a batch size.
        train_dataloader_kwargs: As for `train`.
        data_is_sharded: As for `train`.

    Raises:
        OptionError: A number out of its range.
        ModelError: The optimizer's first group has no learning rate above 0, which the others could be multiples of.
        NestedRunError: A run of the trainer is under way.

    Source: Smith, 2015, https://arxiv.org/abs/1506.01186

    Example:
        >>> from ptacc import Trainer
        >>> from ptacc.testing import iris, iris_parts
        >>> search = find_learning_rate(Trainer(**iris_parts()), iris(), per_device_batch_size=16)
        >>> 0.001 < search.suggestion < 1.0
        True
    """
    owner = "find_learning_rate"
    check_at_least(owner, "steps", steps, FEWEST)
    for name, value in (("min_lr", min_lr), ("max_lr", max_lr), ("max_rise", max_rise)):
        check_positive(owner, name, value)
    if max_lr <= min_lr:
        raise OptionError(f"{owner}(max_lr={max_lr!r}): must be above min_lr, which is {min_lr!r}.")
    kwargs = train_dataloader_kwargs or {}
    call: dict[str, Any] = {} if collate_fn is None else {"collate_fn": collate_fn}
    with trial_of(trainer, train_dataset, kwargs.get("sampler"), kwargs.get("batch_sampler")) as trial:
        sweep = Sweep(trial, geometric(min_lr, max_lr, steps), DivergenceDetector(max_rise))
        vars(trial)["on_gradients_ready"] = sweep.before_update
        trial.train(
            train_dataset,
            max_steps=steps + 1,  # one step after that with the largest rate
            per_device_batch_size=per_device_batch_size,
            train_dataloader_kwargs=kwargs,
            data_is_sharded=data_is_sharded,
            stop_check_every=1,
            **call,
        )
    return sweep.result()


class Sweep:
    """Sets the learning rate of each step in turn, right before its update, and keeps the losses.

    Args:
        trial: The trainer that is trained.
        rates: The rates.
        watch: What sees losses run away.
    """

    def __init__(self, trial: AnyLoop, rates: tuple[float, ...], watch: DivergenceDetector) -> None:
        """Begin before the first step."""
        self._trial, self._rates, self._watch = trial, rates, watch
        self._hook = trial.on_gradients_ready
        self._multiples = [relative_rates(slot.optimizer) for slot in trial.optimizer_slots()]
        self._losses: list[float] = []
        self._stopped: str | None = None
        self._is_over = False

    def before_update(self, step: StepResult) -> None:
        """Take in the loss of a step, and set the rate that it will update with."""
        self._hook(step)
        if self._is_over:  # and the processes have not agreed on it yet
            return
        taken = step.step - 1
        distributed = self._trial.distributed
        loss = distributed.sum([float(step.loss)])[0] / distributed.world_size
        self._losses[taken:] = [loss]  # a scaler may have skipped the update before, and the step is taken again
        if self._watch.has_run_away(loss):
            before = f"after a step with {self._rates[taken - 1]:.3g}" if taken else "before the first step"
            self._stopped = f"the loss is {loss:.4g} {before}"
            self._end(self._stopped)
        elif taken == len(self._rates):
            self._end("every rate was tried")
        else:
            for slot, multiples in zip(self._trial.run.engine.slots, self._multiples, strict=True):
                for group, multiple in zip(slot.optimizer.param_groups, multiples, strict=True):
                    put_rate(group, self._rates[taken] * multiple)

    def _end(self, reason: str) -> None:
        self._is_over = True
        self._trial.stop(reason)

    def result(self) -> LearningRateSearch:
        """Return what was seen: each loss but the first came after a step with a rate."""
        losses = self._losses[1:]
        return LearningRateSearch(self._rates[: len(losses)], tuple(losses), self._stopped)


def relative_rates(optimizer: Optimizer) -> list[float]:
    """Return the learning rates of all parameter groups as multiples of the first one's.

    Raises:
        ModelError: That is not above 0.
    """
    rates: list[Any] = [group.get("lr") for group in optimizer.param_groups]
    if not all(isinstance(rate, int | float | Tensor) for rate in rates) or not rates[0] > 0:
        raise ModelError(
            f"The learning rates of {type(optimizer).__name__} are {rates}: the first has to be above 0, as the others "
            "are taken as multiples of it. Put a group that is trained first."
        )
    return [float(rate) / float(rates[0]) for rate in rates]


def put_rate(group: dict[str, Any], rate: float) -> None:
    """Give a parameter group a learning rate: a tensor in place of a tensor, which itself is left alone."""
    group["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], Tensor) else rate
