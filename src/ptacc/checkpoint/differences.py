"""The differences between a checkpoint and the trainer that resumes from it, found before anything is loaded.

Each difference has a name, such as `optimizer` or `model.head.weight`. `resume_ignore` has patterns of names. A
pattern also covers the names below it: `model` covers `model.head.weight`, and so does `model.head`.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol, runtime_checkable

from ptacc.checkpoint.frozen import FROZEN, frozen_differences
from ptacc.checkpoint.parts import KINDS, MODEL, OPTIONS
from ptacc.checkpoint.resume import Resumption
from ptacc.core.frozen import without
from ptacc.core.hooks import TrainerCore
from ptacc.core.module_options import merge_options
from ptacc.errors import CheckpointError
from ptacc.model.optimizer_state import name_differences
from ptacc.model.state_dict import full_shape, weight_differences
from ptacc.types.protocols import StateDict

DATA_ORDER = "data_order"
DATA_SPLIT = {DATA_ORDER: "in the order of", "batch_size": "split into"}
"""Invariants that must not change within an epoch, and how they are described."""


@runtime_checkable
class ComparesStates(Protocol):
    """A state that says whether it can be loaded, such as that of metrics. Otherwise it is started afresh."""

    def difference(self, state_dict: StateDict, /) -> str:
        """Describe why the state cannot continue from a saved one, empty if it can."""
        ...


@dataclass(frozen=True)
class Difference:
    """A difference that prevents a run from resuming.

    Args:
        part: What differs: the name of a part of the checkpoint, or of an invariant of the run.
        text: Describes the difference.
        tensor: The name of the tensor that differs, if it is one.
    """

    part: str
    text: str
    tensor: str = ""

    @property
    def name(self) -> str:
        """The name of what differs, as users give it to ignore the difference."""
        return f"{self.part}.{self.tensor}" if self.tensor else self.part

    def is_ignored(self, patterns: Collection[str]) -> bool:
        """Return whether a pattern covers the name."""
        below = [f"{pattern}.*" for pattern in patterns]
        return self.name in patterns or any(fnmatchcase(self.name, pattern) for pattern in (*patterns, *below))


@dataclass(frozen=True)
class Comparison:
    """Compares a checkpoint with a trainer within a run.

    Args:
        trainer: The trainer.
        present: The trainer's parts that all ranks share.
        present_own: The trainer's parts of this rank.
        saved: The checkpoint.
    """

    trainer: TrainerCore
    present: Mapping[str, Any]
    present_own: Mapping[str, Any]
    saved: Resumption

    def check(self, ignored: Collection[str]) -> frozenset[str]:
        """Return the names of the parts that differ, but whose differences are covered by the patterns in `ignored`.

        Raises:
            CheckpointError: There are other differences; the message lists each of them.
        """
        found = [*self._invariants(), *self._parts(), *self._tensors()]
        if refused := [difference for difference in found if not difference.is_ignored(ignored)]:
            names = ", ".join(repr(part) for part in dict.fromkeys(difference.part for difference in refused))
            raise CheckpointError(
                "The checkpoint does not match this trainer:\n  "
                + "\n  ".join(difference.text for difference in refused)
                + f"\nCreate the trainer as it was, or resume despite the differences: resume_ignore={{{names}}}."
            )
        self._check_data_order()
        return frozenset(difference.part for difference in found)

    def _invariants(self) -> Iterator[Difference]:
        now, before = self.trainer.run.invariants, self.saved.invariants
        for name in dict.fromkeys([*now, *before]):
            if before.get(name) != now.get(name) and name != DATA_ORDER and not is_setting(self.trainer, name):
                old, new = (repr(values[name]) if name in values else "not set" for values in (before, now))
                yield Difference(name, f"{name} was {old} and is {new}")

    def _parts(self) -> Iterator[Difference]:
        shared, own = self.saved.shared, self.saved.own
        for name in sorted((self.present.keys() ^ shared.keys()) - {FROZEN}):
            what = "no" if name in self.present else "an unexpected"
            yield Difference(name, f"the checkpoint has {what} part {name!r}")
        for key, state in self.trainer.run.states() if self.trainer.run.is_within_epoch else ():
            if key.name in self.present_own and key.name not in own:
                yield Difference(key.name, f"the checkpoint has no part {key.name!r} for this rank")
            elif key.name in own and (text := find_difference(state, own[key.name])):
                yield Difference(key.name, f"{key.name}: {text}")
        for name, kind in self.present[KINDS].items():
            if (before := shared[KINDS].get(name, kind)) != kind:
                yield Difference(name, f"{name} was a {before} and is a {kind}")

    def _tensors(self) -> Iterator[Difference]:
        shared = self.saved.shared
        left_out = shared.get(FROZEN, {}).get(MODEL, ())
        for part, name, text in frozen_differences(self.trainer, self.present, shared):
            yield Difference(part, text, name)
        for name, text in weight_differences(without(self.present[MODEL], left_out), shared[MODEL]):
            yield Difference(MODEL, text, name)
        for slot in self.trainer.run.engine.slots:
            if slot.name in self.present and slot.name in shared:
                for text in name_differences(self.trainer.trained_modules, slot.optimizer, shared[slot.name]):
                    yield Difference(slot.name, text)
        for part in self.trainer.run.averages():
            here, there = (parts.get(part, {}).get("averages", {}) for parts in (self.present, shared))
            for name in here.keys() & there.keys():
                if (now := full_shape(here[name])) != (before := full_shape(there[name])):
                    yield Difference(part, f"the average of {name} is {now}, and the checkpoint's {before}", name)
        yield from self._options()

    def _options(self) -> Iterator[Difference]:
        frozen = self.saved.shared.get(FROZEN, {})
        for option, state in merge_options(self.present[OPTIONS], self.present_own[OPTIONS]).items():
            saved = {name: value for name, value in self.saved.options.get(option, {}).items() if name in state}
            left_out = frozen.get(f"{OPTIONS}.{option}", ())
            for name, text in weight_differences(without(state, left_out), saved, option):
                yield Difference(OPTIONS, text, f"{option}.{name}")

    def _check_data_order(self) -> None:
        """Raise `CheckpointError` if the run would resume within an epoch whose remaining samples are unknown."""
        run = self.trainer.run
        for name, how in DATA_SPLIT.items() if run.is_within_epoch else ():
            old, new = self.saved.invariants[name], run.invariants[name]
            allows_change = name != DATA_ORDER and run.data.partition_scheme.allows_rebatching
            if old != new and not allows_change:
                raise CheckpointError(
                    f"The checkpoint is within an epoch whose data was {how} {old}, and is now {how} {new}: the "
                    "remaining samples are unknown. Resume from the end of an epoch, or with the same DataLoader."
                )


def find_difference(state: object, saved: StateDict) -> str:
    """Describe why a state cannot continue from a saved one, empty if it can or does not say."""
    return state.difference(saved) if isinstance(state, ComparesStates) else ""


# ---- differences that are allowed


def is_setting(trainer: TrainerCore, name: str) -> bool:
    """Return whether an invariant is a setting of an optimizer's parameter groups, such as `optimizer.lr`."""
    return any(name.startswith(f"{slot.name}.") for slot in trainer.optimizer_slots())


def warn_of_changes(
    trainer: TrainerCore, saved: Resumption, ignored: Collection[str], left_out: Collection[str]
) -> None:
    """Warn, on rank 0, of differences from the saved run that change the results of a run that resumes.

    These are the number of ranks, settings of the optimizer, and the order of the data. The parts in `left_out`, such
    as the state of another type of optimizer, were not loaded.
    """
    if not trainer.distributed.is_main:
        return
    ranks, ranks_before = trainer.distributed.world_size, saved.manifest.world_size
    if ranks_before != ranks:
        warnings.warn(
            f"The run resumes with {ranks} processes, and was saved with {ranks_before}: results are equal up to "
            "rounding, except for random operations.",
            stacklevel=2,
        )
    before, now = saved.invariants, trainer.run.invariants
    changed = [name for name in now if name in before and before[name] != now[name]]
    changed = [name for name in changed if not any(fnmatchcase(name, pattern) for pattern in ignored)]
    settings = [name for name in changed if is_setting(trainer, name) and name.partition(".")[0] not in left_out]
    if settings:
        old, new = (", ".join(f"{name}={values[name]}" for name in settings) for values in (before, now))
        warnings.warn(
            f"The run resumes with the settings of the saved run: {old}, and not with {new}. To train with other "
            "settings, set them in the callback event `on_load`, or start a new run after "
            "load_checkpoint(..., weights_only=True).",
            stacklevel=2,
        )
    if DATA_ORDER in changed:
        old, new = before[DATA_ORDER], now[DATA_ORDER]
        warnings.warn(f"The order of the data was {old}, and is {new} from this epoch on.", stacklevel=2)
