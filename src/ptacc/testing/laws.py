"""The laws of composition, which every mixin keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from ptacc.composition.guards import COOPERATIVE_SHAPES
from ptacc.core.batch_hooks import BatchMixin
from ptacc.core.hooks import Mixin
from ptacc.loop.explain import declared_hooks
from ptacc.rng import permutation
from ptacc.testing.datasets import tiny_data, tiny_parts
from ptacc.trainers.supervised import Trainer
from ptacc.types.protocols import Stateful

Options: TypeAlias = Callable[[], Mapping[str, Any]]
"""Makes the options of one trainer: a second trainer may need others, such as a directory of its own."""


def check_mixin(mixin: type[Mixin], *, options: Mapping[str, Any] | None = None) -> None:
    """Check that a mixin keeps the laws of composition.

    1. Every cooperative override reaches the class behind it.
    2. With default options, losses equal the bare trainer's to the last bit.
    3. Saving and loading its state is the identity.
    4. The order of two unrelated mixins changes nothing: here, its own and one that overrides every hook.

    Args:
        mixin: The mixin.
        options: The options that have no default; `mixin.law_options()` if not given.

    Raises:
        AssertionError: A law is broken; the message says which, and where.
    """
    given = mixin.law_options if options is None else lambda: options
    check_overrides_reach_behind(mixin, given)
    check_default_options_change_nothing(mixin, given)
    check_state_survives(mixin, given)
    check_order_changes_nothing(mixin, Probe, options)


def check_overrides_reach_behind(mixin: type[Mixin], options: Options) -> None:
    """Check the first law, with a probe put behind the mixin that hears every cooperative hook."""
    trainer = compose(mixin, Probe)(**tiny_parts(), **options())
    assert isinstance(trainer, Probe)
    train_tiny(trainer)
    trainer.on_exception(RuntimeError("a probe"))
    trainer.on_save(Path("probe"))
    trainer.on_load(Path("probe"))
    trainer.load_run_state()
    trainer.save_on_exception(RuntimeError("a probe"))
    for _ in trainer.stream_predictions(tiny_data()):
        break
    shapes = declared_hooks(Probe)  # a base of the mixin may declare hooks of its own, behind which no probe can be
    own = {name for base in mixin.__mro__ if is_users(base, mixin) for name in base.__dict__}
    for name in sorted(own & {name for name, shape in shapes.items() if shape in COOPERATIVE_SHAPES}):
        assert name in trainer.heard, f"{mixin.__name__}.{name} does not reach the class behind it: call super()"


def check_default_options_change_nothing(mixin: type[Mixin], options: Options) -> None:
    """Check the second law."""
    bare, mixed = train_tiny(Trainer(**tiny_parts())), train_tiny(compose(mixin)(**tiny_parts(), **options()))
    assert bare == mixed, f"{mixin.__name__} with default options changes losses: {bare} became {mixed}"


def check_state_survives(mixin: type[Mixin], options: Options) -> None:
    """Check the third law, for all that the mixin keeps in the run's state."""
    trained, fresh = (compose(mixin)(**tiny_parts(), **options()) for _ in range(2))
    train_tiny(trained)
    fresh.train(tiny_data(), tiny_data(), num_epochs=1)
    blank = {key.name: state for key, state in fresh.run.states()}
    for key, state in trained.run.states():
        if isinstance(state, Stateful):
            saved = state.state_dict()
            blank[key.name].load_state_dict(saved)
            assert same(blank[key.name].state_dict(), saved), (
                f"{mixin.__name__}: {key.name} is not the same after loading"
            )


def check_order_changes_nothing(
    first: type[Mixin], second: type[Mixin], options: Mapping[str, Any] | None = None
) -> None:
    """Check the fourth law, for two mixins of one's own."""

    def given() -> Mapping[str, Any]:
        return {**first.law_options(), **second.law_options()} if options is None else options

    losses = [train_tiny(compose(*order)(**tiny_parts(), **given())) for order in ((first, second), (second, first))]
    assert losses[0] == losses[1], f"losses depend on whether {first.__name__} or {second.__name__} comes first"


def train_tiny(trainer: Trainer) -> list[float]:
    """Train two epochs of three steps with evaluations, in the data's order, and return every loss in it."""
    data = tiny_data()
    history = trainer.train(
        data, data, num_epochs=2, per_device_batch_size=8, train_dataloader_kwargs={"shuffle": False}
    )
    evaluated = [epoch.eval_loss for epoch in history]
    return [*(step.loss for step in history.steps), *(loss for loss in evaluated if loss is not None)]


class Probe(BatchMixin):
    """Hears every cooperative hook, and passes each on."""

    heard: set[str] = field(init=False, default_factory=set)


def _passing_on(name: str) -> Callable[..., Any]:
    def hear(self: Probe, *args: object) -> object:
        self.heard.add(name)
        return getattr(super(Probe, self), name)(*args)

    return hear


for _name, _shape in declared_hooks(Probe).items():
    if _shape in COOPERATIVE_SHAPES:
        setattr(Probe, _name, _passing_on(_name))


def compose(*mixins: type[Mixin]) -> type[Trainer]:
    """Compose a supervised trainer with mixins, in this order."""
    return cast(type[Trainer], type("".join(m.__name__ for m in mixins) + "Trainer", (*mixins, Trainer), {}))


def is_users(base: type, mixin: type) -> bool:
    """Say whether a base of a mixin is part of what is tested, and not of the core."""
    return Mixin in base.__mro__ and base not in (Mixin, BatchMixin) and base in mixin.__mro__


def same(left: Any, right: Any) -> bool:
    """Say whether two states are equal: tensors to the last bit, NaN equal to NaN."""
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


def epoch_order(seed: int, epoch: int, n: int) -> list[int]:
    """Return the order in which a run shuffles `n` samples in an epoch, counted from 0.

    Example:
        >>> epoch_order(0, 0, 5) == epoch_order(0, 0, 5), sorted(epoch_order(0, 1, 5))
        (True, [0, 1, 2, 3, 4])
    """
    return permutation(seed, epoch, n)
