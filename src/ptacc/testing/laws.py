"""The laws of composition, which hold for every mixin."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ptacc.composition.guards import COOPERATIVE_SHAPES
from ptacc.core.batch_hooks import BatchMixin
from ptacc.core.hooks import Mixin
from ptacc.loop.explain import declared_hooks
from ptacc.testing.datasets import tiny_data, tiny_parts
from ptacc.testing.mixin_options import make_options
from ptacc.trainers.supervised import Trainer
from ptacc.types.protocols import Stateful


def check_mixin(mixin: type[Mixin], *, options: Mapping[str, Any] | None = None) -> None:
    """Check that the laws of composition hold for a mixin.

    1. Every cooperative override reaches the next class by `super()`.
    2. With default options, losses equal those of the bare trainer to the last bit.
    3. A state is the same after it was saved and loaded.
    4. The order of two unrelated mixins changes nothing. The second mixin is one that overrides every hook.

    Args:
        mixin: The mixin.
        options: Values for its options that have no default.

    Raises:
        AssertionError: A law does not hold. The message contains the law and the place.
    """
    given = options or {}
    check_overrides_call_super(mixin, given)
    check_default_options_change_nothing(mixin, given)
    check_state_survives(mixin, given)
    check_order_changes_nothing(mixin, Probe, given)


def check_overrides_call_super(mixin: type[Mixin], options: Mapping[str, Any]) -> None:
    """Check the first law, with a probe behind the mixin that records every cooperative hook."""
    trainer = make_trainer(mixin, Probe, options=options)
    assert isinstance(trainer, Probe)
    train_tiny(trainer)
    trainer.on_exception(RuntimeError("a probe"))
    trainer.on_save("probe")
    trainer.on_load("probe")
    trainer.load_run_state()
    trainer.save_on_exception(RuntimeError("a probe"))
    for _ in trainer.stream_predictions(tiny_data()):
        break
    # A hook that a base of the mixin itself declares never reaches the probe.
    cooperative = {name for name, shape in declared_hooks(Probe).items() if shape in COOPERATIVE_SHAPES}
    overridden = {name for base in mixin.__mro__ if is_under_test(base) for name in base.__dict__}
    for name in sorted(overridden & cooperative):
        assert name in trainer.recorded, f"{mixin.__name__}.{name} does not reach the class behind it: call super()"


def check_default_options_change_nothing(mixin: type[Mixin], options: Mapping[str, Any]) -> None:
    """Check the second law."""
    bare, mixed = train_tiny(make_trainer(options={})), train_tiny(make_trainer(mixin, options=options))
    assert bare == mixed, f"{mixin.__name__} with default options changes losses: {bare} became {mixed}"


def check_state_survives(mixin: type[Mixin], options: Mapping[str, Any]) -> None:
    """Check the third law, for every state of the mixin in the run."""
    trained, fresh = (make_trainer(mixin, options=options) for _ in range(2))
    train_tiny(trained)
    fresh.train(tiny_data(), tiny_data(), num_epochs=1)
    fresh_states = {key.name: state for key, state in fresh.run.states()}
    for key, state in trained.run.states():
        if isinstance(state, Stateful):
            saved, loaded = state.state_dict(), fresh_states[key.name]
            loaded.load_state_dict(saved)
            assert same(loaded.state_dict(), saved), f"{mixin.__name__}: {key.name} is not the same after loading"


def check_order_changes_nothing(
    first: type[Mixin], second: type[Mixin], options: Mapping[str, Any] | None = None
) -> None:
    """Check the fourth law for two mixins.

    Args:
        first: A mixin.
        second: A mixin that is unrelated to it.
        options: Values for their options that have no default.

    Raises:
        AssertionError: Losses depend on the order of the two.
    """
    trainers = (make_trainer(*order, options=options or {}) for order in ((first, second), (second, first)))
    losses = [train_tiny(trainer) for trainer in trainers]
    assert losses[0] == losses[1], f"losses depend on whether {first.__name__} or {second.__name__} comes first"


def make_trainer(*mixins: type[Mixin], options: Mapping[str, Any]) -> Trainer:
    """Make a supervised trainer with mixins, in this order."""
    name = "".join(mixin.__name__ for mixin in mixins)
    composed = cast(type[Trainer], type(f"{name}Trainer", (*mixins, Trainer), {}))
    return composed(**tiny_parts() | make_options(*mixins) | dict(options))


def train_tiny(trainer: Trainer) -> list[float]:
    """Train for two epochs of three steps with evaluations, in the order of the data, and return every loss."""
    data = tiny_data()
    history = trainer.train(
        data, data, num_epochs=2, per_device_batch_size=8, train_dataloader_kwargs={"shuffle": False}
    )
    evaluated = [epoch.eval_loss for epoch in history]
    return [*(step.loss for step in history.steps), *(loss for loss in evaluated if loss is not None)]


class Probe(BatchMixin):
    """Overrides every cooperative hook, and records which of them are called."""

    recorded: set[str] = field(init=False, default_factory=set)


def _make_recording_override(name: str) -> Callable[..., Any]:
    def override(self: Probe, *args: object) -> object:
        self.recorded.add(name)
        return getattr(super(Probe, self), name)(*args)

    return override


for _name, _shape in declared_hooks(Probe).items():
    if _shape in COOPERATIVE_SHAPES:
        setattr(Probe, _name, _make_recording_override(_name))


def is_under_test(base: type) -> bool:
    """Whether a base of a mixin is a mixin itself, and not part of the core."""
    return Mixin in base.__mro__ and base not in (Mixin, BatchMixin)


def same(left: Any, right: Any) -> bool:
    """Whether two states are equal: tensors in every bit, and NaN to NaN."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, Sequence) and not isinstance(left, str) and isinstance(right, Sequence):
        return len(left) == len(right) and all(map(same, left, right))
    both_nan = isinstance(left, float) and isinstance(right, float) and math.isnan(left) and math.isnan(right)
    return both_nan or bool(left == right)
