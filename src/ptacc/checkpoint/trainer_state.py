"""The contents of a checkpoint: parts are collected from a trainer and its run, and restored into them.

```
run, model, flags, optimizer, engine, ema, scheduler, callback.Name, ...   shared: equal on all ranks, or sharded
run, engine, random, train_metrics, ...                                    own: of each rank
```
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import nn

from ptacc.checkpoint.parts import MODEL, RUN, SHARDS, Part, Snapshot, read_full_parts
from ptacc.checkpoint.resume import find_at
from ptacc.checkpoint.storage.filesystem import as_checkpoint_error
from ptacc.checkpoint.storage.paths import split_path
from ptacc.checkpoint.storage.remote_store import open_store
from ptacc.core.hooks import TrainerCore
from ptacc.engines.base import EngineState
from ptacc.errors import CheckpointError
from ptacc.model.averaging import AveragedWeights, holds_averages
from ptacc.model.modes import set_modes
from ptacc.model.optimizer_state import add_names, name_differences, order_by_name
from ptacc.model.state_dict import canonical_name, load_optimizer_state, load_weights, weight_differences
from ptacc.rng import RandomStreams, derive_seed, seed_everything
from ptacc.tensors.dtensor import ShardingSpec, is_dtensor, localize, map_state
from ptacc.tensors.structures import iterate_tensors
from ptacc.types.protocols import StateDict, Stateful

FLAGS, ENGINE, RANDOM = "flags", "engine", "random"


# ---- from a trainer to parts


@runtime_checkable
class ComparesStates(Protocol):
    """A state that says whether it can be loaded, such as that of metrics. Otherwise it is started afresh."""

    def difference(self, state_dict: StateDict, /) -> str:
        """Describe why the state cannot continue from a saved one, empty if it can."""
        ...


def find_difference(state: object, saved: StateDict) -> str:
    """Describe why a state cannot continue from a saved one, empty if it can or does not say."""
    return state.difference(saved) if isinstance(state, ComparesStates) else ""


def collect_parts(trainer: TrainerCore) -> tuple[list[Part], list[Part]]:
    """Return the parts of a trainer within a run: those that all ranks share, and those of this rank.

    Tensors in them are references. A collective where an engine gathers weights.
    """
    run, state = trainer.run, trainer.run.engine.get_state()
    shared = {
        RUN: run.state_dict(),
        MODEL: state.weights,
        FLAGS: get_flags(trainer.unwrapped_model),
        ENGINE: state.shared,
        **state.optimizers,
    }
    for slot in run.engine.slots:
        if slot.name in shared:
            shared[slot.name] = add_names(trainer.unwrapped_model, slot.optimizer, shared[slot.name])
    random = RandomStreams(devices=trainer.device.type != "cpu")
    own = {RUN: run.rank_state_dict(), ENGINE: state.own, RANDOM: random.state_dict()}
    return (
        [*(Part(name, value) for name, value in shared.items()), *stateful_parts(trainer, each_rank=False)],
        [*(Part(name, value) for name, value in own.items()), *stateful_parts(trainer, each_rank=True)],
    )


def stateful_parts(trainer: TrainerCore, *, each_rank: bool) -> Iterator[Part]:
    """Yield the parts of mixins and callbacks."""
    for name, state in named_states(trainer, each_rank=each_rank):
        yield Part(name, state.state_dict(), getattr(state, "state_version", 1))


def named_states(trainer: TrainerCore, *, each_rank: bool) -> Iterator[tuple[str, Stateful]]:
    """Yield the states of mixins and callbacks, each with the name of its part."""
    for key, state in trainer.run.states():
        if key.each_rank == each_rank and key.saved and isinstance(state, Stateful):
            yield key.name, state
    counts: dict[str, int] = {}
    for callback in trainer.all_callbacks():
        if isinstance(callback, Stateful) and not each_rank:
            name = f"callback.{type(callback).__name__}"
            counts[name] = counts.get(name, 0) + 1
            yield f"{name}.{counts[name]}" if counts[name] > 1 else name, callback


def move_shards(shared: list[Part], own: list[Part]) -> tuple[list[Part], list[Part]]:
    """Move shared parts with DTensors to the parts of this rank, which saves its shards of them."""
    sharded = {part.name: part.state for part in shared if any(map(is_dtensor, iterate_tensors(part.state)))}
    if not sharded:
        return shared, own
    return [part for part in shared if part.name not in sharded], [*own, Part(SHARDS, sharded)]


def get_flags(model: nn.Module) -> StateDict:
    """Return the names of modules in eval mode, and of frozen parameters."""
    return {
        "eval": [canonical_name(name) for name, module in model.named_modules() if not module.training],
        "frozen": [canonical_name(name) for name, p in model.named_parameters() if not p.requires_grad],
    }


# ---- from parts to a trainer


def load_into(
    trainer: TrainerCore, path: str, key: bytes | None, *, weights_only: bool
) -> tuple[str, dict[str, AveragedWeights]]:
    """Load the weights of a checkpoint, and the optimizer's state, into a trainer.

    Returns:
        The path of the checkpoint, and its averages of the weights by the names of their parts.

    Raises:
        CheckpointError: The path has no checkpoint, or one of another model.
    """
    found = find_at(path, open_store(path, key))
    directory, name = split_path(found)
    store = open_store(directory, key)
    with as_checkpoint_error(path):
        shared = read_full_parts(store, store.manifest(name))
    model, slots = trainer.unwrapped_model, () if weights_only else trainer.optimizer_slots()
    states = [order_by_name(model, slot.optimizer, shared[slot.name]) for slot in slots]
    load_weights(model, shared[MODEL])
    for slot, state in zip(slots, states, strict=True):
        load_optimizer_state(slot.optimizer, state)
    averages = {part: AveragedWeights(model) for part, state in shared.items() if holds_averages(state)}
    for part, average in averages.items():
        average.load_state_dict(shared[part])
    return found, averages


def restore(trainer: TrainerCore, shared: Snapshot, own: Snapshot, ignored: Collection[str] = ()) -> None:
    """Restore a trainer within a run from a checkpoint, the random generators last. A collective.

    `ignored` contains the names of parts that may be missing, and of differences that are allowed.

    Raises:
        CheckpointError: The checkpoint does not match the trainer; the message lists each difference.
    """
    check_matches(trainer, shared, own, ignored)
    run, model = trainer.run, trainer.unwrapped_model
    dtensors = {ShardingSpec.from_tensor(p): p for p in model.parameters() if is_dtensor(p)}
    states = map_state({**shared}, partial(localize, dtensors=dtensors))
    optimizers = {
        slot.name: order_by_name(model, slot.optimizer, states[slot.name])
        for slot in run.engine.slots
        if slot.name in states
        and not (slot.name in ignored and any(name_differences(model, slot.optimizer, states[slot.name])))
    }
    if FLAGS in states:  # before the weights: a module's `train(mode)` may change them
        load_flags(model, states[FLAGS])
    run.engine.load_state(EngineState(states.get(MODEL, {}), optimizers, states.get(ENGINE, {}), own.get(ENGINE, {})))
    for parts, each_rank in ((states, False), (own, True)):
        for name, state in named_states(trainer, each_rank=each_rank):
            if name in parts and not find_difference(state, parts[name]):
                state.load_state_dict(parts[name])
    if RANDOM in own:
        RandomStreams(devices=trainer.device.type != "cpu").load_state_dict(own[RANDOM])
    else:  # saved by another number of ranks
        seed_everything(derive_seed(run.seed, run.progress.steps, trainer.distributed.replica))


def check_matches(trainer: TrainerCore, shared: Snapshot, own: Snapshot, ignored: Collection[str]) -> None:
    """Raise `CheckpointError` with each difference between a checkpoint and a trainer that is not ignored."""
    found = [(name, text) for name, text in resume_differences(trainer, shared, own) if name not in ignored]
    if found:
        names = ", ".join(repr(name) for name in dict.fromkeys(name for name, _ in found))
        raise CheckpointError(
            "The checkpoint does not match this trainer:\n  "
            + "\n  ".join(text for _, text in found)
            + f"\nCreate the trainer as it was, or resume despite the differences: resume_ignore={{{names}}}."
        )
    run, scheme = trainer.run, trainer.run.data.partition_scheme
    before = shared[RUN]["conditions"]["batch_size"]
    if run.is_within_epoch and before != scheme.batching and not scheme.allows_rebatching:
        raise CheckpointError(
            f"The checkpoint is within an epoch whose data was split into {before}, and is now split into "
            f"{scheme.batching}: the remaining samples are unknown. Resume from the end of an epoch, or with the same "
            "split."
        )


def resume_differences(trainer: TrainerCore, shared: Snapshot, own: Snapshot) -> Iterator[tuple[str, str]]:
    """Yield each difference between a checkpoint and a trainer: the name to ignore it by, and a description."""
    run = trainer.run
    for name, value in run.invariants.items():
        before = shared[RUN]["conditions"].get(name)
        if before != value:
            yield name, f"{name} was {before!r} and is {value!r}"
    needed: dict[str, Any] = {part.name: part.state for part in collect_parts(trainer)[0]}
    for name in sorted(needed.keys() ^ shared.keys()):
        yield name, f"the checkpoint has {'no' if name in needed else 'an unexpected'} part {name!r}"
    for name, state in named_states(trainer, each_rank=True) if run.is_within_epoch else ():
        if name not in own:
            yield name, f"the checkpoint has no part {name!r} for this rank"
        elif text := find_difference(state, own[name]):
            yield name, f"{name}: {text}"
    yield from ((MODEL, text) for text in weight_differences(needed[MODEL], shared.get(MODEL, {})))
    for slot in run.engine.slots:
        if slot.name in shared:
            texts = name_differences(trainer.unwrapped_model, slot.optimizer, shared[slot.name])
            yield from ((slot.name, text) for text in texts)


def load_flags(model: nn.Module, flags: StateDict) -> None:
    """Set the mode of each module, and which parameters are frozen."""
    in_eval, frozen = set(flags["eval"]), set(flags["frozen"])
    set_modes([(module, canonical_name(name) not in in_eval) for name, module in model.named_modules()])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(canonical_name(name) not in frozen)
