"""Loading the weights of a checkpoint, and the optimizer's state, into a trainer: all of them, or without some."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from os import PathLike

from ptacc.checkpoint.differences import Difference
from ptacc.checkpoint.frozen import FROZEN, add_own_averages, frozen_differences, without
from ptacc.checkpoint.options import holds
from ptacc.checkpoint.parts import BUFFERS, MODEL, OPTIONS, Snapshot, read_full_parts
from ptacc.checkpoint.resume import find_at
from ptacc.checkpoint.storage.remote_store import open_store
from ptacc.core.hooks import TrainerCore
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.engines.base import OptimizerSlot
from ptacc.errors import CheckpointError, OptionError
from ptacc.files.filesystem import as_checkpoint_error
from ptacc.files.paths import parse_path, split_path
from ptacc.model.averaging import AveragedWeights, holds_averages
from ptacc.model.optimizer_state import check_names, order_by_name, replace_parameters
from ptacc.model.state_dict import get_weights, load_optimizer_state, load_weights, weight_differences
from ptacc.types.protocols import StateDict
from ptacc.validation import did_you_mean


def load_into(
    trainer: TrainerCore,
    distributed: DistributedRuntime,
    path: str | PathLike[str],
    key: bytes | None,
    *,
    weights_only: bool,
    ignore: Collection[str],
) -> tuple[str, dict[str, AveragedWeights]]:
    """Load the weights of a checkpoint, and the optimizer's state, into a trainer. A collective.

    Args:
        trainer: The trainer, outside of a run.
        distributed: Its process group.
        path: The checkpoint, or a directory of them.
        key: The key of signed checkpoints.
        weights_only: Whether to leave the optimizer unchanged.
        ignore: Patterns of the tensors that keep their own values.

    Returns:
        The path of the checkpoint, and its averages of the weights by the names of their parts.

    Raises:
        CheckpointError: The path has no checkpoint, or one of another model.
        OptionError: A pattern in `ignore` matches nothing.
    """
    with distributed.synced("load_checkpoint()"):
        found, shared = read_checkpoint(path, key)
        ignored = find_ignored(trainer, shared, ignore)
    different = list(find_differences(trainer, shared, ignored))
    with distributed.synced("the loading of load_checkpoint()"):
        if different:
            raise CheckpointError(
                "The weights are of another model:\n  "
                + "\n  ".join(sorted(text for _, text in different))
                + "\nCreate the model as it was, or keep its own values of these tensors, or of a pattern of names: "
                f"load_checkpoint(..., ignore={sorted({f'{MODEL}.{name}' for name, _ in different})})."
            )
        model, slots = trainer.unwrapped_model, () if weights_only else trainer.optimizer_slots()
        states = {slot.name: fit_optimizer_state(trainer, slot, shared[slot.name], ignored) for slot in slots}
        load_weights(model, without(shared[MODEL], ignored), strict=False)
        for slot in slots:
            load_optimizer_state(slot.optimizer, states[slot.name])
        return found, load_averages(trainer, shared, ignored)


def read_checkpoint(path: str | PathLike[str], key: bytes | None) -> tuple[str, Snapshot]:
    """Return the path of a checkpoint, and its shared parts."""
    location = parse_path(path)
    found = find_at(location, open_store(location, key))
    directory, name = split_path(found)
    store = open_store(directory, key)
    with as_checkpoint_error(location):
        return found, read_full_parts(store, store.manifest(name))


def find_ignored(trainer: TrainerCore, shared: Snapshot, patterns: Collection[str]) -> frozenset[str]:
    """Return the names of the tensors, of the model or the checkpoint, that patterns such as `model.head.*` cover.

    Raises:
        OptionError: A pattern covers nothing.
    """
    if not holds(patterns, str):
        raise OptionError(f"load_checkpoint(ignore={patterns!r}): must be a collection of names: {{'model.head.*'}}.")
    names = {*get_weights(trainer.unwrapped_model), *shared[MODEL], *shared.get(FROZEN, {}).get(MODEL, {})}
    found = {p: [name for name in names if Difference(MODEL, "", name).is_ignored([p])] for p in patterns}
    if unmatched := [pattern for pattern, its_names in found.items() if not its_names]:
        pattern = unmatched[0]
        known = sorted(f"{MODEL}.{name}" for name in names)
        prefixed = f"{MODEL}.{pattern}"
        is_prefix_missing = any(Difference(MODEL, "", name).is_ignored([prefixed]) for name in names)
        advice = f"Did you mean `{prefixed}`? " if is_prefix_missing else did_you_mean(pattern, known)
        raise OptionError(
            f"load_checkpoint(ignore=...): {pattern!r} matches no tensor of the model or the checkpoint. {advice}"
            f"Give names such as {known[0]!r}, or patterns."
        )
    return frozenset(name for its_names in found.values() for name in its_names)


def find_differences(trainer: TrainerCore, shared: Snapshot, ignored: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the differences between the weights of a trainer and a checkpoint, with the names of the tensors.

    A collective if the checkpoint leaves out frozen tensors.
    """
    present = get_weights(trainer.unwrapped_model)
    left_out = without(shared.get(FROZEN, {}).get(MODEL, {}), ignored)
    own = {MODEL: present, BUFFERS: {}, OPTIONS: {}}
    for _, name, text in frozen_differences(trainer, own, {FROZEN: {MODEL: left_out}}):
        yield name, text
    yield from weight_differences(without(present, {*left_out, *ignored}), without(shared[MODEL], ignored))


def fit_optimizer_state(
    trainer: TrainerCore, slot: OptimizerSlot, state: StateDict, ignored: Collection[str]
) -> StateDict:
    """Return a saved state in the order of the optimizer, without those of parameters in `ignored`, or raise."""
    model = trainer.unwrapped_model
    fitted = replace_parameters(model, slot.optimizer, state, frozenset(ignored)) if ignored else state
    check_names(model, slot.optimizer, fitted)
    return order_by_name(model, slot.optimizer, fitted)


def load_averages(trainer: TrainerCore, shared: Snapshot, ignored: Collection[str]) -> dict[str, AveragedWeights]:
    """Return the averages of a checkpoint. Those of tensors that were not loaded equal the tensors."""
    model = trainer.unwrapped_model
    averages = {part: AveragedWeights(model) for part, state in shared.items() if holds_averages(state)}
    completed = add_own_averages(trainer, shared, ignored)
    for part, average in averages.items():
        average.load_state_dict(completed[part])
    return averages
