"""Loading the weights of a checkpoint, and the optimizer's state, into a trainer: all of them, or without some."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from os import PathLike

from ptacc.checkpoint.catalog import CheckpointEntry, choose, list_run
from ptacc.checkpoint.differences import Difference
from ptacc.checkpoint.frozen import FROZEN, add_own_averages, frozen_differences
from ptacc.checkpoint.options import holds
from ptacc.checkpoint.parts import BUFFERS, MODEL, OPTIONS, Snapshot, read_full_parts
from ptacc.checkpoint.resume import find_at
from ptacc.core.frozen import without
from ptacc.core.hooks import TrainerCore
from ptacc.core.module_options import parameters_of
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.engines.base import OptimizerSlot
from ptacc.errors import CheckpointError, OptionError
from ptacc.files.filesystem import as_checkpoint_error
from ptacc.files.paths import parse_path, resolve_links, split_path
from ptacc.model.averaging import AveragedWeights, holds_averages
from ptacc.model.optimizer_state import check_names, order_by_name, replace_parameters
from ptacc.model.state_dict import get_weights, load_optimizer_state, load_weights, weight_differences
from ptacc.run.schedule import schedule_key, with_settings
from ptacc.storage.remote_store import open_sibling, open_store
from ptacc.types.monitor import Best, Monitor
from ptacc.types.protocols import StateDict
from ptacc.validation import did_you_mean


def load_into(
    trainer: TrainerCore,
    distributed: DistributedRuntime,
    path: str | PathLike[str],
    key: bytes | None,
    *,
    which: str | Monitor | None,
    weights_only: bool,
    ignore: Collection[str],
) -> tuple[str, dict[str, AveragedWeights]]:
    """Load the weights of a checkpoint, and the optimizer's state, into a trainer. A collective.

    Args:
        trainer: The trainer, outside of a run.
        distributed: Its process group.
        path: The checkpoint, or a directory of them.
        key: The key of signed checkpoints.
        which: The checkpoint of a directory: the best by a value, the newest one with a label, or for None the newest.
        weights_only: Whether to leave the optimizer unchanged.
        ignore: Patterns of the tensors that keep their own values.

    Returns:
        The path of the checkpoint, and its averages of the weights by the names of their parts.

    Raises:
        CheckpointError: The path has no checkpoint, or one of another model.
        OptionError: A pattern in `ignore` matches nothing.
    """
    with distributed.synced("load_checkpoint()"):
        found, shared = read_checkpoint(path, key, which)
        ignored = find_ignored(trainer, shared, ignore)
    different = list(find_differences(trainer, shared, ignored))
    with distributed.synced("the loading of load_checkpoint()"):
        if different:
            raise CheckpointError(
                "The weights are of another model:\n  "
                + "\n  ".join(sorted(one.text for one in different))
                + "\nCreate the model as it was, or keep its own values of these tensors, or of a pattern of names: "
                f"load_checkpoint(..., ignore={sorted({one.name for one in different})})."
            )
        slots, prefixes = () if weights_only else trainer.optimizer_slots(), {MODEL: ""}
        kept = frozenset(f"{prefixes.get(part, f'{part}.')}{name}" for part, names in ignored.items() for name in names)
        states = {slot.name: fit_optimizer_state(trainer, slot, unscheduled(shared, slot), kept) for slot in slots}
        saved = saved_weights(trainer, shared)
        outside = {f"{OPTIONS}.{place}": module for place, module in trainer.trained_outside.items()}
        for part, module in {MODEL: trainer.unwrapped_model, **outside}.items():
            load_weights(module, without(saved.get(part, {}), ignored.get(part, ())), strict=False)
        for slot in slots:
            load_optimizer_state(slot.optimizer, states[slot.name])
        return found, load_averages(trainer, shared, kept)


def read_checkpoint(path: str | PathLike[str], key: bytes | None, which: str | Monitor | None) -> tuple[str, Snapshot]:
    """Return the path of a checkpoint, and its shared parts."""
    location = parse_path(path)
    store = open_store(location, key)
    if which is None:
        found = find_at(location, store)
    else:
        entry = choose(location, list_run(open_sibling(store, resolve_links(location)), ""), which, warn_of_skipped)
        found = entry.store.locate(entry.name)
    directory, name = split_path(found)
    store = open_store(directory, key)
    with as_checkpoint_error(location):
        return found, read_full_parts(store, store.manifest(name))


def warn_of_skipped(entry: CheckpointEntry) -> None:
    """Warn of a damaged checkpoint."""
    warnings.warn(f"{entry.store.locate(entry.name)} is skipped: {entry.problem}", stacklevel=2)


def find_which(owner: str, which: str | Monitor | Best, keep_best: Best | None) -> str | Monitor | None:
    """Return the value or the label that `which` stands for, None for the newest checkpoint.

    Raises:
        OptionError: It is `"best"`, and `keep_best` does not say by which value; or of another type.
    """
    if which == "best" and keep_best is None:
        raise OptionError(
            f"{owner}.load_checkpoint(which='best'): the best by which value? Give it: which=Best('eval_loss'), or set "
            "keep_best. SaveBest labels its checkpoints with the name of its value: which='eval_loss'."
        )
    if which == "last":
        return None
    chosen = keep_best if which == "best" else which
    if not isinstance(chosen, str | Monitor | Best):
        raise OptionError(f"{owner}.load_checkpoint(which={which!r}): must be 'best', 'last', a label or a Best(...).")
    return chosen.resolved_monitor if isinstance(chosen, Best) else chosen


# ---- the weights of the model, and of each module that is trained with it, by the names of their parts


def own_weights(trainer: TrainerCore) -> dict[str, StateDict]:
    """Return a trainer's tensors that are loaded: all of the model, and the parameters of the other modules."""
    outside = {f"{OPTIONS}.{place}": parameters_of(module) for place, module in trainer.trained_outside.items()}
    return {MODEL: get_weights(trainer.unwrapped_model), **outside}


def saved_weights(trainer: TrainerCore, shared: Snapshot) -> dict[str, StateDict]:
    """Return the tensors of a checkpoint that are loaded, of those modules that have some in it."""
    options = {place: shared[OPTIONS].get(place, {}) for place in trainer.trained_outside}
    return {MODEL: shared[MODEL], **{f"{OPTIONS}.{place}": state for place, state in options.items() if state}}


def find_ignored(trainer: TrainerCore, shared: Snapshot, patterns: Collection[str]) -> dict[str, frozenset[str]]:
    """Return the tensors, of the trainer or the checkpoint, that patterns such as `model.head.*` cover, by their parts.

    Raises:
        OptionError: A pattern covers nothing.
    """
    if not holds(patterns, str):
        raise OptionError(f"load_checkpoint(ignore={patterns!r}): must be a collection of names: {{'model.head.*'}}.")
    own, saved, frozen = own_weights(trainer), saved_weights(trainer, shared), shared.get(FROZEN, {})
    tensors = [
        Difference(part, "", name) for part in own for state in (own, saved, frozen) for name in state.get(part, ())
    ]
    for pattern in patterns:
        if not any(tensor.is_ignored([pattern]) for tensor in tensors):
            known, prefixed = sorted({tensor.name for tensor in tensors}), f"{MODEL}.{pattern}"
            is_prefix_missing = any(tensor.is_ignored([prefixed]) for tensor in tensors)
            advice = f"Did you mean `{prefixed}`? " if is_prefix_missing else did_you_mean(pattern, known)
            raise OptionError(
                f"load_checkpoint(ignore=...): {pattern!r} matches no tensor of the model or the checkpoint. {advice}"
                f"Give names such as {known[0]!r}, or patterns."
            )
    ignored = [tensor for tensor in tensors if tensor.is_ignored(patterns)]
    return {part: frozenset(tensor.tensor for tensor in ignored if tensor.part == part) for part in own}


def find_differences(
    trainer: TrainerCore, shared: Snapshot, ignored: Mapping[str, Collection[str]]
) -> Iterator[Difference]:
    """Yield the differences between the weights of a trainer and a checkpoint.

    A collective if the checkpoint leaves out frozen tensors.
    """
    own, saved, frozen = own_weights(trainer), saved_weights(trainer, shared), shared.get(FROZEN, {})
    left_out = {part: without(frozen.get(part, {}), ignored[part]) for part in own}
    present = {
        MODEL: own[MODEL],
        BUFFERS: {},
        OPTIONS: {place: own[f"{OPTIONS}.{place}"] for place in trainer.trained_outside},
    }
    for part, name, text in frozen_differences(trainer, present, {FROZEN: left_out}):
        yield Difference(part, text, name)
    for part in saved:
        here = without(own[part], {*left_out[part], *ignored[part]})
        for name, text in weight_differences(
            here, without(saved[part], ignored[part]), part.removeprefix(f"{OPTIONS}.")
        ):
            yield Difference(part, text, name)


# ---- optimizers and averages


def unscheduled(shared: Snapshot, slot: OptimizerSlot) -> StateDict:
    """Return the saved state of an optimizer with the settings that it had before its schedule changed them.

    A new run starts its schedule with them, as the next run of the saved trainer does.
    """
    state: StateDict = shared[slot.name]
    if (schedule := shared.get(schedule_key(slot.name).name)) is None:
        return state
    parts = zip(state["param_groups"], schedule["initial"], strict=True)
    return {**state, "param_groups": [with_settings(group, settings) for group, settings in parts]}


def fit_optimizer_state(
    trainer: TrainerCore, slot: OptimizerSlot, state: StateDict, ignored: frozenset[str]
) -> StateDict:
    """Return a saved state in the order of the optimizer, without those of parameters in `ignored`, or raise."""
    model = trainer.trained_modules
    fitted = replace_parameters(model, slot.optimizer, state, ignored) if ignored else state
    check_names(model, slot.optimizer, fitted)
    return order_by_name(model, slot.optimizer, fitted)


def load_averages(trainer: TrainerCore, shared: Snapshot, ignored: Collection[str]) -> dict[str, AveragedWeights]:
    """Return the averages of a checkpoint. Those of tensors that were not loaded equal the tensors."""
    averages = {
        part: AveragedWeights(trainer.trained_modules) for part, state in shared.items() if holds_averages(state)
    }
    completed = add_own_averages(trainer, shared, ignored)
    for part, average in averages.items():
        average.load_state_dict(completed[part])
    return averages
