"""The contents of a checkpoint: parts are collected from a trainer and its run, and restored into them.

```
run, model, buffers, optimizer, engine, ema, scheduler, callback.Name, ... shared: equal on all ranks, or sharded
run, engine, random, options, train_metrics, ...                           own: of each rank
```
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ptacc.checkpoint.differences import Comparison, find_difference, warn_of_changes
from ptacc.checkpoint.frozen import Fingerprints, add_own_averages, fingerprint_frozen
from ptacc.checkpoint.parts import BUFFERS, KINDS, MODEL, OPTIONS, RUN, SHARDS, Snapshot, check_storable
from ptacc.checkpoint.resume import Resumption
from ptacc.core.hooks import TrainerCore
from ptacc.core.module_options import find_misfits, load_option_states, option_states
from ptacc.core.unsaved import warn_of_unsaved_states
from ptacc.engines.base import EngineState
from ptacc.errors import OptionError
from ptacc.model.averaging import AveragedWeights
from ptacc.model.modes import set_modes
from ptacc.model.optimizer_state import add_names, order_by_name
from ptacc.model.state_dict import (
    canonical_name,
    drop_misfits,
    load_non_persistent_buffers,
    non_persistent_buffers,
)
from ptacc.rng import RandomStreams, derive_seed, seed_everything
from ptacc.run.schedule import Schedule
from ptacc.serialization.safetensors_file import is_storable
from ptacc.tensors.dtensor import ShardingSpec, is_dtensor, localize, map_state
from ptacc.tensors.structures import iterate_tensors
from ptacc.types.protocols import StateDict, Stateful

FLAGS, ENGINE, RANDOM = "flags", "engine", "random"


# ---- from a trainer to parts


def collect_parts(trainer: TrainerCore) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parts of a trainer within a run: those that all ranks share, and those of this rank.

    Tensors in them are references. A collective where an engine gathers weights.
    """
    run, trained, state = trainer.run, trainer.trained_modules, trainer.run.engine.get_state()
    slots = [slot for slot in run.engine.slots if slot.name in state.optimizers]
    optimizers = {slot.name: add_names(trained, slot.optimizer, state.optimizers[slot.name]) for slot in slots}
    shared = {
        RUN: run.state_dict(),
        **collect_tensors(trainer, state.weights),
        KINDS: {key.name: get_kind(value) for key, value in run.states() if isinstance(value, Stateful)},
        FLAGS: get_flags(trained),
        ENGINE: state.shared,
        **{slot.name: run.optimizer_modes.add_weights(slot.optimizer, optimizers[slot.name]) for slot in slots},
        **stateful_parts(trainer, each_rank=False),
    }
    own = {
        RUN: run.rank_state_dict(),
        ENGINE: state.own,
        RANDOM: RandomStreams(trainer.device).state_dict(),
        OPTIONS: option_states(trainer, each_rank=True),
        **stateful_parts(trainer, each_rank=True),
    }
    return shared, own


def collect_tensors(trainer: TrainerCore, weights: StateDict) -> dict[str, Any]:
    """Return the parts with the weights of the model, its other buffers, and the parameters among the options."""
    buffers = non_persistent_buffers(trainer.unwrapped_model)
    return {
        MODEL: weights,
        BUFFERS: {name: value for name, value in buffers.items() if is_storable(value)},
        OPTIONS: option_states(trainer, each_rank=False),
    }


def fingerprint_start(trainer: TrainerCore) -> Fingerprints:
    """Return the fingerprints of the tensors that are not trained, at the start of a run. A collective."""
    return fingerprint_frozen(trainer, collect_tensors(trainer, trainer.run.engine.get_state().weights))


def get_kind(state: Stateful) -> str:
    """Return the name of a state's class. That of a schedule is the class of the scheduler in it."""
    return type(state.scheduler if isinstance(state, Schedule) else state).__name__


def stateful_parts(trainer: TrainerCore, *, each_rank: bool) -> dict[str, StateDict]:
    """Return the parts of mixins and callbacks."""
    return {name: state.state_dict() for name, state in named_states(trainer, each_rank=each_rank)}


def named_states(trainer: TrainerCore, *, each_rank: bool) -> Iterator[tuple[str, Stateful]]:
    """Yield the states of mixins and callbacks, each with the name of its part."""
    for key, state in trainer.run.states():
        if key.each_rank == each_rank and key.saved and isinstance(state, Stateful):
            yield key.name, state
    if not each_rank:
        yield from name_callbacks(trainer).items()


def check_states(trainer: TrainerCore) -> None:
    """Raise `CheckpointError` for a state that cannot be stored, and warn of those that are not saved."""
    if not trainer.is_isolated:
        warn_of_unsaved_states(trainer)
    for parts in collect_parts(trainer):
        check_storable(parts)


def check_first_states(trainer: TrainerCore) -> None:
    """Raise `CheckpointError` if states cannot be stored that optimizers and metrics have from the first step on."""
    check_storable({slot.name: slot.optimizer.state_dict() for slot in trainer.run.engine.slots})
    check_storable(stateful_parts(trainer, each_rank=True))


def name_callbacks(trainer: TrainerCore) -> dict[str, Stateful]:
    """Return the callbacks with a state by the names of their parts, which do not depend on their order."""
    named: dict[str, Stateful] = {}
    for callback in trainer.all_callbacks():
        if isinstance(callback, Stateful):
            kind, key = type(callback).__name__, callback.state_key()
            if (name := ".".join(["callback", kind, *filter(None, [key])])) in named:
                raise OptionError(
                    f"{type(trainer).__name__}: two callbacks are a {kind} with the state_key {key!r}, so a "
                    "checkpoint cannot distinguish their states. Override state_key() to return one of its own."
                )
            named[name] = callback
    return named


def move_shards(shared: dict[str, Any], own: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Move shared parts with DTensors to the parts of this rank, which saves its shards of them."""
    sharded = {name: state for name, state in shared.items() if any(map(is_dtensor, iterate_tensors(state)))}
    if not sharded:
        return shared, own
    return {name: state for name, state in shared.items() if name not in sharded}, {**own, SHARDS: sharded}


def get_flags(model: nn.Module) -> StateDict:
    """Return the names of modules in eval mode, and of frozen parameters."""
    return {
        "eval": [canonical_name(name) for name, module in model.named_modules() if not module.training],
        "frozen": [canonical_name(name) for name, p in model.named_parameters() if not p.requires_grad],
    }


# ---- from parts to a trainer


def restore_run(trainer: TrainerCore, saved: Resumption, ignored: Collection[str]) -> bool:
    """Restore a trainer within a run, and warn of changes. Return False if it is called again, at the epoch's start."""
    is_last = trainer.run.is_consistent or not trainer.run.is_within_epoch
    # Objects may change the states that they load.
    left_out = restore(trainer, saved if is_last else copy.deepcopy(saved), ignored)
    if is_last:
        warn_of_changes(trainer, saved, ignored, left_out)
    return is_last


def restore(trainer: TrainerCore, saved: Resumption, ignored: Collection[str] = ()) -> frozenset[str]:
    """Restore a trainer within a run from a checkpoint, the random generators last. A collective.

    What the checkpoint lacks, and what does not fit but is ignored, keeps its present state.

    Returns:
        The names of the parts that differ, but whose differences are ignored.

    Raises:
        CheckpointError: The checkpoint does not match the trainer; the message lists each difference.
    """
    present, present_own = collect_parts(trainer)
    left_out = Comparison(trainer, present, present_own, saved).check(ignored)
    model = trainer.unwrapped_model
    dtensors = {ShardingSpec.from_tensor(p): p for p in model.parameters() if is_dtensor(p)}
    shared = Snapshot(add_own_averages(trainer, map_state({**saved.shared}, partial(localize, dtensors=dtensors))))
    saved = replace(saved, shared=shared)
    load_flags(trainer.trained_modules, shared[FLAGS])  # before the weights: a module's `train(mode)` may change them
    load_engine(trainer, saved, drop_misfits(present[MODEL], shared[MODEL]), left_out)
    load_non_persistent_buffers(model, shared[BUFFERS])
    load_option_states(trainer, saved.options)
    for slot in trainer.run.engine.slots:  # after the weights, which are those to use
        if slot.name in shared and slot.name not in left_out:
            trainer.run.optimizer_modes.load_weights(slot.optimizer, shared[slot.name])
    for parts, each_rank in ((shared, False), (saved.own, True)):
        for name, state in named_states(trainer, each_rank=each_rank):
            if name in parts and isinstance(state, Schedule):
                state.load_state_dict(parts[name], is_same_class=name not in left_out)
            elif name in parts and name not in left_out and not find_difference(state, parts[name]):
                state.load_state_dict(parts[name])
            elif isinstance(state, AveragedWeights):
                state.copy_from(trainer.trained_modules)  # averages start from the weights that were loaded
    if RANDOM in saved.own:
        RandomStreams(trainer.device).load_state_dict(saved.own[RANDOM])
    else:  # saved by another number of ranks
        seed_everything(derive_seed(trainer.run.seed, trainer.run.progress.steps, trainer.distributed.replica))
    return left_out


def load_engine(trainer: TrainerCore, saved: Resumption, weights: StateDict, left_out: Collection[str]) -> None:
    """Load weights into the engine, and the states of its optimizers.

    The optimizers in `left_out` keep their states, and parameters whose weights do not fit start without one.
    """
    trained, engine, shared = trainer.trained_modules, trainer.run.engine, saved.shared
    loaded = [slot for slot in engine.slots if slot.name in shared and slot.name not in left_out]
    optimizers = {slot.name: order_by_name(trained, slot.optimizer, shared[slot.name]) for slot in loaded}
    engine.load_state(EngineState(weights, optimizers, shared[ENGINE], saved.own.get(ENGINE, {})))
    misfits = shared[MODEL].keys() - weights.keys() | find_misfits(trainer, saved.options)
    for name, parameter in trained.named_parameters(remove_duplicate=False):
        if canonical_name(name) in misfits:
            for slot in loaded:
                slot.optimizer.state.pop(parameter, None)  # it is that of a parameter with another shape


def load_flags(model: nn.Module, flags: StateDict) -> None:
    """Set the mode of each module, and which parameters are frozen."""
    in_eval, frozen = set(flags["eval"]), set(flags["frozen"])
    set_modes([(module, canonical_name(name) not in in_eval) for name, module in model.named_modules()])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(canonical_name(name) not in frozen)
