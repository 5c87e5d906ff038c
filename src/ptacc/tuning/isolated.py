"""An isolated copy of a trainer, for searches and assertions: training it changes nothing outside of it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from torch.optim.lr_scheduler import ConstantLR

from ptacc.errors import NestedRunError
from ptacc.loop.loop import TrainingLoop
from ptacc.mixins.lr_scheduler import LRSchedulerMixin
from ptacc.rng import derive_seed, seed_everything
from ptacc.tuning.preserving import preserve_state

AnyLoop: TypeAlias = TrainingLoop[Any, Any, Any]

SEED = 0
"""The seed of the copy's runs, so that a second search or assertion gives the same result."""
OVERRIDES: Mapping[str, object] = {
    "is_isolated": True,
    "history_file": None,
    "make_seed": lambda: SEED,
    "find_resume_state": lambda: None,
    "save_run_state": lambda: None,
    "save_on_exception": lambda _: None,
    "stop_signals": frozenset,
    "should_stop": lambda: None,
    "monitors": lambda: (),
    "all_callbacks": lambda: (),
    "print": lambda *_: None,
}
"""Attributes of the copy. They take precedence over its class, so they replace the hooks of all mixins."""


@contextlib.contextmanager
def isolated_copy(trainer: AnyLoop, *data: object) -> Iterator[AnyLoop]:
    """Yield a copy of a trainer to train, and restore after the block everything that the training changed.

    The copy shares the trainer's model, optimizer, options and mixins. Its runs resume nothing, save nothing, handle no
    signals, call no callbacks, print nothing, and end only at their planned length. A mixin that writes files or sends
    reports in other hooks has to check `is_isolated`.

    Args:
        trainer: The trainer to copy.
        data: Datasets, mappings of datasets, loaders and samplers that the copy will read. None is skipped.

    Raises:
        NestedRunError: The trainer is running.
    """
    if trainer.is_running:
        raise NestedRunError(
            f"A search or an assertion within a run of {type(trainer).__name__}: call it before or after the run."
        )
    copied = copy.copy(trainer)
    vars(copied).update(OVERRIDES)
    for field in dataclasses.fields(copied):
        if not field.init and field.default_factory is not dataclasses.MISSING:
            vars(copied)[field.name] = field.default_factory()  # a new state, like that of a new trainer
    with preserve_state(trainer, data):
        yield copied


@contextlib.contextmanager
def search_copy(trainer: AnyLoop, *data: object) -> Iterator[AnyLoop]:
    """Yield an `isolated_copy` with a constant learning rate, and seed the global generators for the block."""
    with isolated_copy(trainer, *data) as copied:
        if isinstance(copied, LRSchedulerMixin):
            copied.create_scheduler = lambda optimizer, _: ConstantLR(optimizer, factor=1.0)
            copied.scheduler_interval = "step"
        seed_everything(derive_seed(SEED, copied.distributed.replica))
        yield copied
