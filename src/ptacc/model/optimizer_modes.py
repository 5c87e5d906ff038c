"""Optimizers with modes: `train()` and `eval()` switch between the weights to train and the weights to use.

A schedule-free optimizer computes gradients at a point `y`, and its result is an average `x` of its steps. The
parameters hold `y` in train mode, and `x` in eval mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from ptacc.model.averaging import copy_into
from ptacc.model.optimizer_state import TRAIN_WEIGHTS, group_names
from ptacc.tensors.dtensor import match_placement
from ptacc.types.protocols import StateDict


@runtime_checkable
class HasModes(Protocol):
    """An optimizer with modes. To call the method of the present mode changes nothing."""

    def train(self) -> object:
        """Set the parameters to the weights to train."""
        ...

    def eval(self) -> object:
        """Set the parameters to the weights to use."""
        ...


class OptimizerModes:
    """Switches the optimizers of a run between their modes. For optimizers without modes, it does nothing.

    A switch to eval mode and back rounds. After an evaluation or a checkpoint, the parameters therefore get back a copy
    of the weights of train mode, so that neither changes the training.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        """Find the optimizers with modes. The user's model has the names of the parameters."""
        self._model = model
        self._optimizers = [optimizer for optimizer in optimizers if isinstance(optimizer, HasModes)]
        self._is_training = False
        self._train_weights: dict[Tensor, Tensor] = {}

    @property
    def has_any(self) -> bool:
        """Whether there is an optimizer with modes."""
        return bool(self._optimizers)

    @contextlib.contextmanager
    def training(self) -> Generator[None]:
        """Surround a run: train mode from its start until `finish` or the end of the block, and eval mode after it."""
        self._is_training = True
        self._train()
        try:
            yield
        except BaseException:
            with contextlib.suppress(RuntimeError):  # a device that has failed may fail again
                self.finish()
            raise
        self.finish()

    def finish(self) -> None:
        """End train mode for this run."""
        if self._is_training:
            self._is_training = False
            self._eval()

    @contextlib.contextmanager
    def evaluating(self) -> Generator[None]:
        """Surround a use of the weights: eval mode, unless it is eval mode already."""
        if not self._is_training or not self.has_any:
            yield
            return
        self._train_weights = {parameter: parameter.detach().clone() for parameter in self._parameters()}
        self._is_training = False
        try:
            self._eval()
            yield
        finally:
            self._train()
            copy_into(self._train_weights.items())
            self._is_training, self._train_weights = True, {}

    # ---- checkpoints: the model's saved weights are those to use, and resumed runs also need those to train

    def add_weights(self, optimizer: Optimizer, state: StateDict) -> StateDict:
        """Add the weights of train mode by name to the state of an optimizer, if it has modes."""
        if not isinstance(optimizer, HasModes):
            return state
        weights = {name: self._train_weights.get(p, p.detach()) for name, p in self._named(optimizer)}
        return {**state, TRAIN_WEIGHTS: weights}

    def load_weights(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Load the weights that `add_weights` added, after the state itself, which was saved in eval mode.

        Weights of another shape are left out.
        """
        if isinstance(optimizer, HasModes):
            optimizer.train()
            saved: Mapping[str, Any] = state.get(TRAIN_WEIGHTS, {})
            named = ((parameter, saved[name]) for name, parameter in self._named(optimizer) if name in saved)
            copy_into((p, match_placement(p, value)) for p, value in named if p.shape == value.shape)

    def _parameters(self) -> Iterator[Parameter]:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]

    def _named(self, optimizer: Optimizer) -> Iterator[tuple[str, Parameter]]:
        names = group_names(self._model, optimizer)
        for in_group, group in zip(names, optimizer.param_groups, strict=True):
            yield from zip(in_group, group["params"], strict=True)

    def _train(self) -> None:
        for optimizer in self._optimizers:
            optimizer.train()

    def _eval(self) -> None:
        for optimizer in self._optimizers:
            optimizer.eval()
