"""Checkpoints without frozen tensors, which come from the model that the user creates again.

```
start of a run   fingerprints of all tensors that are not trained
save             those with the same fingerprint are left out; the part "frozen" has their fingerprints
resume, load     the fingerprints of the present model's tensors must be those in the checkpoint
```

A tensor is left out if it is a parameter that is in no optimizer and requires no gradient, or a buffer, and if it has
not changed since the start of the run. What a callback changes, such as a momentum encoder, is saved.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeAlias

from ptacc.checkpoint.parts import BUFFERS, MODEL, OPTIONS
from ptacc.core.frozen import fingerprint_tensors, trained_names, without
from ptacc.core.hooks import TrainerCore
from ptacc.core.module_options import module_options
from ptacc.model.averaging import AVERAGE_DTYPES, averageable_tensors, holds_averages

FROZEN = "frozen"
"""The part with the fingerprints of the tensors that a checkpoint leaves out."""

Fingerprints: TypeAlias = Mapping[str, Mapping[str, str]]
"""The fingerprint, dtype and shape of each tensor, by the name of its part."""


def leave_out_frozen(trainer: TrainerCore, shared: Mapping[str, Any], at_start: Fingerprints) -> dict[str, Any]:
    """Return shared parts without the tensors that are neither trained nor changed since the start. A collective."""
    now = fingerprint_frozen(trainer, shared)
    frozen = {
        part: {name: text for name, text in texts.items() if at_start.get(part, {}).get(name) == text}
        for part, texts in now.items()
    }
    kept = {part: without(state, frozen[part]) for part, state in list_tensors(shared).items()}
    options = {place: kept[f"{OPTIONS}.{place}"] for place in shared[OPTIONS]}
    averaged = {**frozen[MODEL], **frozen[BUFFERS]}
    averages = {
        part: {**state, "averages": without(state["averages"], averaged)}
        for part, state in shared.items()
        if holds_averages(state)
    }
    changed = {MODEL: kept[MODEL], BUFFERS: kept[BUFFERS], OPTIONS: options, FROZEN: frozen}
    return {**shared, **changed, **averages}


def fingerprint_frozen(trainer: TrainerCore, shared: Mapping[str, Any]) -> Fingerprints:
    """Return the fingerprints of all tensors that are not trained, equal on all ranks. A collective."""
    optimizers = [slot.optimizer for slot in trainer.run.engine.slots]
    owners = {f"{OPTIONS}.{place}": module for place, module in module_options(trainer).items()}
    states = list_tensors(shared)
    excluded = {part: trained_names(owners.get(part, trainer.unwrapped_model), optimizers) for part in states}
    return {part: fingerprint_tensors(trainer, without(state, excluded[part])) for part, state in states.items()}


def list_tensors(shared: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the tensors of the model, its other buffers, and each module among the options, by their parts."""
    options = {f"{OPTIONS}.{place}": state for place, state in shared[OPTIONS].items()}
    return {MODEL: shared[MODEL], BUFFERS: shared[BUFFERS], **options}


# ---- from a checkpoint


def frozen_differences(
    trainer: TrainerCore, present: Mapping[str, Any], saved: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """Yield the tensors that a checkpoint leaves out, and whose values are others now: part, name, description.

    A collective if the checkpoint leaves any out.
    """
    left_out: Fingerprints = saved.get(FROZEN, {})
    if not any(left_out.values()):
        return
    states = list_tensors(present)
    for part, texts in left_out.items():
        sought = {name: value for name, value in states.get(part, {}).items() if name in texts}
        now = fingerprint_tensors(trainer, sought)
        for name, text in texts.items():
            if name not in now:
                yield part, name, f"the frozen {name} of the checkpoint is not in the {part}"
            elif now[name] != text:
                yield (
                    part,
                    name,
                    f"the {part}'s frozen {name}, which the checkpoint leaves out, had other values when it was saved",
                )


def add_own_averages(trainer: TrainerCore, saved: Mapping[str, Any], ignored: Collection[str] = ()) -> dict[str, Any]:
    """Return saved parts with complete averages: those of tensors that are not loaded equal the tensors.

    These are the tensors that the checkpoint leaves out, and those in `ignored`.
    """
    left_out = {*ignored, *(name for part in (MODEL, BUFFERS) for name in saved.get(FROZEN, {}).get(part, {}))}
    own = {
        name: tensor.detach().to(AVERAGE_DTYPES[tensor.dtype])
        for name, tensor in averageable_tensors(trainer.trained_modules)
        if name in left_out
    }
    averages = {
        part: {**state, "averages": {**own, **without(state["averages"], ignored)}}
        for part, state in saved.items()
        if holds_averages(state)
    }
    return {**saved, **averages}
