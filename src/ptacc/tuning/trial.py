"""A trial: a short run of a copy of a trainer, which is heard by nobody and leaves nothing behind."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import NestedRunError
from ptacc.loop.loop import TrainingLoop
from ptacc.rng import derive_seed, seed_everything
from ptacc.tuning.preserving import find_stateful_parts, preserve_state
from ptacc.types.protocols import StateDict

AnyLoop: TypeAlias = TrainingLoop[Any, Any, Any]

SEED = 0
"""Of every trial that has none of its own, so that the same search finds the same."""
IDLE_OPTIONS: Mapping[str, object] = {
    "callbacks": (),
    "default_callbacks": (),
    "history_file": None,
    "train_metrics": {},
    "create_scheduler": lambda *_: NoSchedule(),
    "scheduler_interval": "step",
    "swa_start": None,
    "profile_dir": None,
    "profile_wait": 1_000_000,
}
"""Options with which a trainer, or a mixin where it is composed, leaves the rate, the weights and files alone."""
IDLE_HOOKS: Mapping[str, object] = {
    "make_seed": lambda: SEED,
    "find_resume_state": lambda: None,
    "save_run_state": lambda: None,
    "save_on_exception": lambda *_: None,
    "should_stop": lambda: None,
    "monitors": lambda: (),
    "print": lambda *_: None,
}
"""Hooks of a run that is not saved, goes on from nothing, watches and tells nothing, and ends by its length alone."""


class NoSchedule:
    """A schedule that changes nothing, and unlike torch's leaves no mark on the optimizer."""

    def step(self) -> None:
        """Stay."""

    def state_dict(self) -> StateDict:
        """Return nothing."""
        return {}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take nothing over."""


@contextlib.contextmanager
def trial_of(trainer: AnyLoop, data: object, *samplers: object, alone: bool = False) -> Iterator[AnyLoop]:
    """Give the block a copy of a trainer to train, and put everything back after it.

    The copy has the trainer's model, optimizer and mixins. Their hooks take part in a trial, since they are part of
    what is trained; callbacks hear nothing, and nothing is scheduled, evaluated, saved or stopped early.

    Args:
        trainer: The trainer.
        data: What the copy will be trained on.
        samplers: What will sample from it.
        alone: Whether each process trains by itself, and knows nothing of the others.

    Raises:
        NestedRunError: A run of the trainer is under way.
    """
    if trainer.is_running:
        raise NestedRunError(f"A search within a run of {type(trainer).__name__}: make it before, or after it.")
    copied = copy.copy(trainer)
    runtime = trainer.accelerator, DistributedRuntime()
    # On the object, they stand before those of its class: the loop asks the object.
    vars(copied).update({name: value for name, value in IDLE_OPTIONS.items() if hasattr(copied, name)})
    vars(copied).update({**IDLE_HOOKS, "_runtime": lambda: runtime} if alone else IDLE_HOOKS)
    with folder_for(copied), preserve_state(trainer, find_stateful_parts(data, samplers)):
        seed_everything(derive_seed(SEED, copied.distributed.replica))
        yield copied


@contextlib.contextmanager
def folder_for(copied: AnyLoop) -> Iterator[None]:
    """Have a trainer that would make a directory for checkpoints make it elsewhere, for the block."""
    if not hasattr(copied, "checkpoint_dir"):
        yield
        return
    distributed = copied.distributed
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(tempfile.TemporaryDirectory(prefix="ptacc-")) if distributed.rank == 0 else ""
        vars(copied)["checkpoint_dir"] = distributed.broadcast(made)
        yield
