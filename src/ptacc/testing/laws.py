"""The laws of composition, which hold for every mixin."""

from __future__ import annotations

import atexit
import copy
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ConstantLR
from typing_extensions import override

from ptacc.composition.guards import COOPERATIVE_SHAPES
from ptacc.core.batch_hooks import BatchMixin
from ptacc.core.callback import Callback
from ptacc.core.hooks import Mixin, TrainerCore
from ptacc.loop.explain import declared_hooks
from ptacc.mixins.checkpoint import CheckpointMixin
from ptacc.mixins.compile import CompileMixin
from ptacc.mixins.ema import EMAMixin
from ptacc.mixins.engines.tensor_parallel import TensorParallelMixin
from ptacc.mixins.lr_scheduler import LRSchedulerMixin
from ptacc.mixins.profiler import ProfilerMixin
from ptacc.testing.datasets import tiny_data, tiny_parts
from ptacc.trainers.supervised import Trainer
from ptacc.types.outputs import EpochRecord
from ptacc.types.protocols import Stateful


def check_mixin(mixin: type[Mixin], *, options: Mapping[str, Any] | None = None) -> None:
    """Check that the laws of composition hold for a mixin.

    1. Every cooperative override reaches the next class by `super()`.
    2. With default options, losses equal those of a trainer without the mixin to the last bit.
    3. A state is the same after it is saved and loaded.
    4. The order of two unrelated mixins does not change losses. The other mixin here overrides every hook.

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
    # Only the hooks of the core: one that a base of the mixin declares does not reach the probe.
    cooperative = {name for name, shape in declared_hooks(Probe).items() if shape in COOPERATIVE_SHAPES}
    bases = [base for base in mixin.__mro__ if Mixin in base.__mro__ and base not in (Mixin, BatchMixin)]
    overridden = {name for base in bases for name in vars(base)}
    for name in sorted(overridden & cooperative):
        assert name in trainer.recorded, f"{mixin.__name__}.{name} does not reach the class behind it: call super()"


def check_default_options_change_nothing(mixin: type[Mixin], options: Mapping[str, Any]) -> None:
    """Check the second law."""
    expected, got = train_tiny(make_trainer(options={})), train_tiny(make_trainer(mixin, options=options))
    assert got == expected, f"{mixin.__name__} with default options changes losses: {expected} became {got}"


def check_state_survives(mixin: type[Mixin], options: Mapping[str, Any]) -> None:
    """Check the third law, for every state of a run with the mixin."""
    trained = make_trainer(mixin, options=options)
    fresh = make_trainer(mixin, options={**options, "callbacks": [StopAfterEpoch()]})
    train_tiny(trained)
    train_tiny(fresh)
    fresh_states = {key.name: state for key, state in fresh.run.states()}
    for key, state in trained.run.states():
        if isinstance(state, Stateful):
            saved, loaded = copy.deepcopy(state.state_dict()), fresh_states[key.name]
            loaded.load_state_dict(copy.deepcopy(saved))
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


class StopAfterEpoch(Callback[TrainerCore]):
    """Stops a run after its first epoch, so that it differs from the others in its states only."""

    @override
    def on_epoch_end(self, trainer: TrainerCore, record: EpochRecord) -> None:
        trainer.stop("one epoch is enough")


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


# ---- options of ptacc's own mixins


def make_directory() -> str:
    """Make a directory that is removed when the process ends."""
    directory = tempfile.TemporaryDirectory(prefix="ptacc-")
    atexit.register(directory.cleanup)
    return directory.name


MIXIN_OPTIONS: Mapping[type[Mixin], Callable[[], Mapping[str, Any]]] = {
    CheckpointMixin: lambda: {"checkpoint_dir": make_directory()},
    CompileMixin: lambda: {"compile_backend": "eager"},
    EMAMixin: lambda: {"ema_decay": 0.0},
    LRSchedulerMixin: lambda: {"create_scheduler": lambda optimizer, _: ConstantLR(optimizer, factor=1.0)},
    ProfilerMixin: lambda: {"profile_wait": 1, "profile_warmup": 1},  # within the few steps of the laws
    TensorParallelMixin: lambda: {"tensor_parallel_plan": {}},  # the model of the laws has no layers to split
}
"""For ptacc's own mixins, the options that have no default, and those that make the mixin act in a short run.

The values do not change losses: the average is the current weights, the rate is constant, nothing is compiled.
"""


def make_options(*mixins: type[Mixin]) -> dict[str, Any]:
    """Return the options in `MIXIN_OPTIONS` for one trainer of some mixins, or of classes derived from them."""
    options: dict[str, Any] = {}
    for mixin, make in MIXIN_OPTIONS.items():
        if any(mixin in composed.__mro__ for composed in mixins):
            options |= make()
    return options
