"""What is in a checkpoint: the parts of a trainer and its run, and how they are put back.

```
run, model, flags, optimizer, engine, ema, scheduler, callback.Name, ...   what all processes have in common
run, engine, random, train_metrics, shards, ...                           what each process has of its own
```
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from ptacc.checkpoint.parts import SHARDS, Part, Snapshot
from ptacc.core.hooks import TrainerCore
from ptacc.errors import CheckpointError, MissingPartError
from ptacc.model.state_dict import canonical, differing_weights
from ptacc.rng import RandomStreams, derive_seed, seed_everything
from ptacc.tensors.dtensor import is_dtensor
from ptacc.types.protocols import StateDict, Stateful

RUN, MODEL, FLAGS, ENGINE, RANDOM = "run", "model", "flags", "engine", "random"


# ---- from a trainer to parts


def shared_parts(trainer: TrainerCore) -> list[Part]:
    """Return the parts that all processes have in common. Tensors in them are the trainer's own, not copies."""
    run, model = trainer.run, trainer.unwrapped_model
    return [
        Part(RUN, run.state_dict()),
        Part(MODEL, run.engine.weights()),
        Part(FLAGS, read_flags(model)),
        Part(ENGINE, run.engine.state_dict()),
        *(Part(name, state) for name, state in run.engine.optimizer_states().items()),
        *(
            Part(name, state.state_dict(), get_state_version(state))
            for name, state in stateful(trainer, each_rank=False)
        ),
    ]


def own_parts(trainer: TrainerCore) -> list[Part]:
    """Return the parts that are this process's own."""
    return [
        Part(RUN, trainer.run.rank_state_dict()),
        Part(ENGINE, trainer.run.engine.own_state_dict()),
        Part(RANDOM, get_random_streams(trainer).state_dict()),
        *(
            Part(name, state.state_dict(), get_state_version(state))
            for name, state in stateful(trainer, each_rank=True)
        ),
    ]


def parts_to_save(trainer: TrainerCore) -> tuple[list[Part], list[Part], dict[str, int]]:
    """Return the parts that are in common, those that are this process's own, and the version of each in common.

    A part in common that holds tensors in shards is saved by each process: it has its own of it.
    """
    shared, mine = shared_parts(trainer), own_parts(trainer)
    versions = {part.name: part.version for part in shared}
    if any(map(is_dtensor, trainer.unwrapped_model.parameters())):
        dealt = {part.name: part.state for part in shared if holds_shards(part.state)}
        shared = [part for part in shared if part.name not in dealt]
        mine = [*mine, Part(SHARDS, dealt)]
    return shared, mine, versions


def holds_shards(state: object) -> bool:
    """Say whether a state has a tensor in it of which this process holds a part."""
    if isinstance(state, Mapping):
        return any(map(holds_shards, state.values()))
    if isinstance(state, list | tuple):
        return any(map(holds_shards, state))
    return is_dtensor(state)


def stateful(trainer: TrainerCore, *, each_rank: bool) -> Iterator[tuple[str, Stateful]]:
    """Iterate over what mixins and callbacks keep, by the names of its parts."""
    for key, state in trainer.run.states():
        if key.each_rank == each_rank and isinstance(state, Stateful):
            yield key.name, state
    counts: dict[str, int] = {}
    for callback in trainer.all_callbacks():
        if isinstance(callback, Stateful) and not each_rank:
            name = f"callback.{type(callback).__name__}"
            counts[name] = counts.get(name, 0) + 1
            yield f"{name}.{counts[name]}" if counts[name] > 1 else name, callback


def get_state_version(state: Stateful) -> int:
    """Return the version of a state's form: what its object has for `state_version`, else 1."""
    version: int = getattr(state, "state_version", 1)
    return version


def get_random_streams(trainer: TrainerCore) -> RandomStreams:
    """Return the generators that a run draws from."""
    return RandomStreams(devices=trainer.device.type != "cpu")


def read_flags(model: nn.Module) -> StateDict:
    """Return which modules are in eval mode, and which parameters are frozen."""
    return {
        "eval": [canonical(name) for name, module in model.named_modules() if not module.training],
        "frozen": [canonical(name) for name, p in model.named_parameters() if not p.requires_grad],
    }


# ---- from parts to a trainer


def check_goes_on(trainer: TrainerCore, shared: Snapshot, own: Snapshot, waived: Collection[str]) -> None:
    """Compare a checkpoint with the trainer that is to go on from it.

    Raises:
        CheckpointError: They differ; the message has each difference, with the name to waive it by.
    """
    found = [(name, what) for name, what in differences(trainer, shared, own) if name not in waived]
    if found:
        names = ", ".join(repr(name) for name in dict.fromkeys(name for name, _ in found))
        raise CheckpointError(
            "The checkpoint does not go on here:\n  "
            + "\n  ".join(what for _, what in found)
            + f"\nMake it as it was, or go on nevertheless: resume_ignore={{{names}}}."
        )
    run, dealing = trainer.run, trainer.run.data.partition_scheme
    before = shared.states[RUN]["conditions"]["batch_size"]
    if run.is_within_epoch and before != dealing.how and not dealing.goes_on_anew:
        raise CheckpointError(
            f"The checkpoint is within an epoch, whose data was dealt in {before} and is dealt in {dealing.how} now: "
            "nobody can tell which samples are left. Go on from the end of an epoch, or as it was."
        )


def differences(trainer: TrainerCore, shared: Snapshot, own: Snapshot) -> Iterator[tuple[str, str]]:
    """Iterate over what differs between a checkpoint and a trainer: the name to waive it by, and what it is."""
    run = trainer.run
    for name, value in run.invariants.items():
        before = shared.states[RUN]["conditions"].get(name)
        if before != value:
            yield name, f"{name} was {before!r} and is {value!r}"
    needed: dict[str, Any] = {part.name: part.state for part in shared_parts(trainer)}
    yield from ((name, f"the checkpoint has no part {name!r}") for name in sorted(needed.keys() - shared.states.keys()))
    unknown = sorted(shared.states.keys() - needed.keys())
    yield from ((name, f"nothing here takes the part {name!r} of the checkpoint") for name in unknown)
    for name, _ in stateful(trainer, each_rank=True):
        if name not in own.states and run.is_within_epoch:
            yield name, f"the checkpoint has no part {name!r} for this process"
    yield from ((MODEL, what) for what in differing_weights(needed[MODEL], shared.states.get(MODEL, {})))


def put_back(trainer: TrainerCore, shared: Snapshot, own: Snapshot, waived: Collection[str] = ()) -> None:
    """Put parts back into a trainer, the random streams last.

    Args:
        trainer: Within its run.
        shared: What all processes have in common.
        own: What is this process's own; parts that are missing are left as they are.
        waived: Names of parts that may be missing.
    """
    run, model = trainer.run, trainer.unwrapped_model
    run.engine.load_weights(shared.take(MODEL), strict=MODEL not in waived)
    load_flags(model, shared.take(FLAGS))
    run.engine.load_state_dict(shared.take(ENGINE))
    for name in run.engine.optimizer_states():
        if name in shared.states or name not in waived:
            run.engine.load_optimizer_state(name, shared.take(name))
    if ENGINE in own.states:
        run.engine.load_own_state_dict(own.take(ENGINE))
    for snapshot, each_rank in ((shared, False), (own, True)):
        for name, state in stateful(trainer, each_rank=each_rank):
            if name in snapshot.states:
                state.load_state_dict(snapshot.take(name))
            elif name not in waived and not each_rank:
                raise MissingPartError(f"The checkpoint has no part {name!r}.")
    if RANDOM in own.states:
        get_random_streams(trainer).load_state_dict(own.take(RANDOM))
    else:  # another number of processes: each draws anew
        seed_everything(derive_seed(run.seed, run.progress.steps, trainer.distributed.replica))


def load_flags(model: nn.Module, flags: StateDict) -> None:
    """Put each module's train flag back, and which parameters are frozen."""
    in_eval, frozen = set(flags["eval"]), set(flags["frozen"])
    for name, module in model.named_modules():
        module.training = canonical(name) not in in_eval
    for name, parameter in model.named_parameters():
        if parameter.requires_grad == (canonical(name) in frozen):
            parameter.requires_grad_(canonical(name) not in frozen)
