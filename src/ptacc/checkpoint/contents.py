"""What is in a checkpoint: the parts of a trainer and its run, and how they are put back.

```
run, model, flags, optimizer, engine, ema, scheduler, callback.Name, ...   what all processes have in common
run, random, train_metrics, ...                                           what each process has of its own
```
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ptacc.checkpoint.snapshot import Part, Snapshot
from ptacc.core.hooks import TrainerCore
from ptacc.core.randomness import RandomStreams, derive_seed, seed_everything
from ptacc.errors import CheckpointError, MissingPartError
from ptacc.protocols import StateDict, Stateful

COMPILED = "_orig_mod."
"""What `torch.compile` puts into the names of a module's tensors."""
RUN, MODEL, FLAGS, ENGINE, RANDOM = "run", "model", "flags", "engine", "random"


# ---- from a trainer to parts


def shared_parts(trainer: TrainerCore) -> list[Part]:
    """Return the parts that all processes have in common. Tensors in them are the trainer's own, not copies."""
    run, model = trainer.run, trainer.unwrapped_model
    return [
        Part(RUN, run.state_dict()),
        Part(MODEL, weights_of(model)),
        Part(FLAGS, flags_of(model)),
        Part(ENGINE, run.engine.state_dict()),
        *(Part(slot.name, slot.optimizer.state_dict()) for slot in run.engine.slots),
        *(Part(name, state.state_dict(), version_of(state)) for name, state in stateful(trainer, each_rank=False)),
    ]


def own_parts(trainer: TrainerCore) -> list[Part]:
    """Return the parts that are this process's own."""
    return [
        Part(RUN, trainer.run.own_state_dict()),
        Part(RANDOM, streams_of(trainer).state_dict()),
        *(Part(name, state.state_dict(), version_of(state)) for name, state in stateful(trainer, each_rank=True)),
    ]


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


def version_of(state: Stateful) -> int:
    """Return the version of a state's form: what its object has for `state_version`, else 1."""
    version: int = getattr(state, "state_version", 1)
    return version


def streams_of(trainer: TrainerCore) -> RandomStreams:
    """Return the generators that a run draws from."""
    return RandomStreams(devices=trainer.device.type != "cpu")


def names_of(model: nn.Module) -> dict[str, str]:
    """Return the names in a model's `state_dict()`, by their canonical names: those of the bare, uncompiled model."""
    return {name.replace(COMPILED, ""): name for name in model.state_dict()}


def weights_of(model: nn.Module) -> StateDict:
    """Return a model's `state_dict()` under canonical names."""
    return {name.replace(COMPILED, ""): value for name, value in model.state_dict().items()}


def flags_of(model: nn.Module) -> StateDict:
    """Return which modules are in eval mode, and which parameters are frozen."""
    return {
        "eval": [name.replace(COMPILED, "") for name, module in model.named_modules() if not module.training],
        "frozen": [name.replace(COMPILED, "") for name, p in model.named_parameters() if not p.requires_grad],
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
            + f"\nMake it as it was, or go on nevertheless: resume_despite={{{names}}}."
        )
    run, dealing = trainer.run, trainer.run.data.dealing
    before = shared.states[RUN]["conditions"]["batch_size"]
    if run.is_within_epoch and before != dealing.how and not dealing.goes_on_anew:
        raise CheckpointError(
            f"The checkpoint is within an epoch, whose data was dealt in {before} and is dealt in {dealing.how} now: "
            "nobody can tell which samples are left. Go on from the end of an epoch, or as it was."
        )


def differences(trainer: TrainerCore, shared: Snapshot, own: Snapshot) -> Iterator[tuple[str, str]]:
    """Iterate over what differs between a checkpoint and a trainer: the name to waive it by, and what it is."""
    run = trainer.run
    for name, value in run.conditions.items():
        before = shared.states[RUN]["conditions"].get(name)
        if before != value:
            yield name, f"{name} was {before!r} and is {value!r}"
    needed = {part.name for part in shared_parts(trainer)}
    yield from ((name, f"the checkpoint has no part {name!r}") for name in sorted(needed - shared.states.keys()))
    unknown = sorted(shared.states.keys() - needed)
    yield from ((name, f"nothing here takes the part {name!r} of the checkpoint") for name in unknown)
    for name, _ in stateful(trainer, each_rank=True):
        if name not in own.states and run.is_within_epoch:
            yield name, f"the checkpoint has no part {name!r} for this process"
    yield from ((MODEL, what) for what in differing_weights(trainer.unwrapped_model, shared.states.get(MODEL, {})))


def differing_weights(model: nn.Module, weights: Mapping[str, Any]) -> Iterator[str]:
    """Iterate over the differences between a model's own tensors and those that are to be loaded."""
    mine = weights_of(model)
    yield from (f"the model's {name} is not in the checkpoint" for name in mine if name not in weights)
    yield from (f"the checkpoint's {name} is not in the model" for name in weights if name not in mine)
    for name in filter(weights.__contains__, mine):
        here, there = form_of(mine[name]), form_of(weights[name])
        if here != there:
            yield f"the model's {name} is {here}, and the checkpoint's {there}"


def form_of(value: object) -> str:
    """Tell the dtype and the shape of a tensor, the type of anything else."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def put_back(trainer: TrainerCore, shared: Snapshot, own: Snapshot, waived: Collection[str] = ()) -> None:
    """Put parts back into a trainer, the random streams last.

    Args:
        trainer: Within its run.
        shared: What all processes have in common.
        own: What is this process's own; parts that are missing are left as they are.
        waived: Names of parts that may be missing.
    """
    run, model = trainer.run, trainer.unwrapped_model
    load_weights(model, shared.take(MODEL), strict=MODEL not in waived)
    load_flags(model, shared.take(FLAGS))
    run.engine.load_state_dict(shared.take(ENGINE))
    for slot in run.engine.slots:
        if slot.name in shared.states or slot.name not in waived:
            load_optimizer(slot.optimizer, shared.take(slot.name))
    for snapshot, each_rank in ((shared, False), (own, True)):
        for name, state in stateful(trainer, each_rank=each_rank):
            if name in snapshot.states:
                state.load_state_dict(snapshot.take(name))
            elif name not in waived and not each_rank:
                raise MissingPartError(f"The checkpoint has no part {name!r}.")
    if RANDOM in own.states:
        streams_of(trainer).load_state_dict(own.take(RANDOM))
    else:  # another number of processes: each draws anew
        seed_everything(derive_seed(run.seed, run.progress.steps, trainer.peers.rank))


def load_weights(model: nn.Module, weights: StateDict, *, strict: bool = True) -> None:
    """Load tensors by their canonical names.

    Raises:
        CheckpointError: They are not the model's; the message has each difference.
    """
    if strict and (different := sorted(differing_weights(model, weights))):
        raise CheckpointError("The weights are of another model:\n  " + "\n  ".join(different))
    names = names_of(model)
    model.load_state_dict({names.get(name, name): value for name, value in weights.items()}, strict=strict)


def load_flags(model: nn.Module, flags: StateDict) -> None:
    """Put each module's train flag back, and which parameters are frozen."""
    in_eval, frozen = set(flags["eval"]), set(flags["frozen"])
    for name, module in model.named_modules():
        module.training = name.replace(COMPILED, "") not in in_eval
    for name, parameter in model.named_parameters():
        if parameter.requires_grad == (name.replace(COMPILED, "") in frozen):
            parameter.requires_grad_(name.replace(COMPILED, "") not in frozen)


def load_optimizer(optimizer: Optimizer, state: StateDict) -> None:
    """Load an optimizer's state, each tensor in the dtype it was saved in: torch's own way casts it to the parameter's.

    Raises:
        CheckpointError: It is the state of other parameters.
    """
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        raise CheckpointError(f"The state of {type(optimizer).__name__} is of other parameters: {error}.") from error
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for name, saved in state["state"].get(number, {}).items():
            loaded = optimizer.state[parameter].get(name)
            if isinstance(saved, Tensor) and isinstance(loaded, Tensor) and saved.dtype != loaded.dtype:
                optimizer.state[parameter][name] = saved.to(loaded.device, copy=True)


def first_non_finite(model: nn.Module) -> str | None:
    """Return the name of a parameter that holds a number which is none, None if there is none. Reads the device."""
    floating = [(name, p.detach()) for name, p in model.named_parameters() if p.is_floating_point() and p.numel()]
    if not floating:
        return None
    # NaN is both the least and the greatest there. A norm would be one call, and takes ten times as long on the CPU.
    is_finite: list[bool] = torch.stack(
        [torch.isfinite(torch.stack(torch.aminmax(p))).all() for _, p in floating]
    ).tolist()
    return next((name for (name, _), good in zip(floating, is_finite, strict=True) if not good), None)
