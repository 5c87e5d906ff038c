"""The state of metrics: what they have taken in, so that a resumed run goes on with them as if nothing had been.

torchmetrics' own `state_dict()` has nearly none of it: states are not persistent by default, counts never are.
```
{"type": "BootStrapper", "states": {}, "values": {"_update_count": 3, ...}, "arguments": {"num_bootstraps": 2, ...},
 "parts": {"metrics.0": {"type": "MeanSquaredError", "states": {"sum_squared_error": ...}, ...}, "metrics.1": ...}}
```

- `states` are what `add_state()` has declared.
- `values` are counts, caches, buffers, and every other attribute that can be stored: `update()` may change any of them.
- `arguments` are attributes named as the constructor's parameters that no other method assigns. They are not loaded
  but compared: a metric that is made otherwise now would take these states for what they are not.
- `parts` are the metrics in it. Of other modules in it, as networks are, the buffers alone are kept.

Objects of other kinds, such as functions and tokenizers, are taken for what a metric is made of. One that `update()`
changes belongs in the metric's `get_extra_state()`, and comes back by its `set_extra_state()`.
"""

from __future__ import annotations

import dis
import inspect
import random
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, MutableSequence, MutableSet
from functools import cache
from itertools import chain
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from ptacc.checkpoint.serialization.json_codec import encode
from ptacc.errors import CheckpointError
from ptacc.tensors.structures import children
from ptacc.types.protocols import Stateful
from ptacc.validation import value_text

CACHES: Final = ("_computed", "_forward_cache")
"""What a metric has computed: kept, since some draw at random, but where it cannot be stored it is computed again."""
FILLED: Final = (MutableSequence, MutableMapping, MutableSet)
GENERATORS: Final = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
PARTS: Final = ("states", "values", "arguments", "parts")
AS_IT_WAS: Final = "Make it as it was made then, or go on without the state of the metrics."


def metric_state(metric: object) -> dict[str, Any]:
    """Return the state of a metric, its tensors and lists as they are: encode it before the metric goes on.

    Args:
        metric: Of torchmetrics: a metric, a collection, or a wrapper; or an object with `state_dict` and
            `load_state_dict` of its own.

    Raises:
        CheckpointError: It has no state of its own, or collects what cannot be stored.

    Example:
        >>> from torchmetrics import SumMetric
        >>> metric = SumMetric()
        >>> metric.update(3.0)
        >>> metric_state(metric)["states"]
        {'sum_value': tensor(3.)}
    """
    kind = type(metric).__qualname__
    if not (isinstance(metric, nn.Module) and is_metric(metric)):
        return {"type": kind, "own": stateful(metric).state_dict()}
    share_in_groups(metric)
    held = look_at(metric)
    held["parts"] = {name: metric_state(part) for name, part in held["parts"].items()}
    return {"type": kind, **held} | ({"extra": metric.get_extra_state()} if has_extra_state(metric) else {})


def load_metric_state(metric: object, state: dict[str, Any]) -> None:
    """Have a metric go on from a state; nothing in it is shared with the state.

    Args:
        metric: Made as the one whose state it is. Tensors are put onto its device.
        state: What `metric_state` returned.

    Raises:
        CheckpointError: It is the state of another metric, or of one that was made in another way.
    """
    if not (isinstance(metric, nn.Module) and is_metric(metric)):
        check_form(type(metric).__qualname__, state, ("own",))
        stateful(metric).load_state_dict(copied(state["own"], None))
        return
    check_form(type(metric).__qualname__, state, PARTS)
    follow_steps(metric, state["parts"])
    held = look_at(metric)
    check_made_alike(metric, held, state)
    for name, part in held["parts"].items():
        load_metric_state(part, state["parts"][name])
    device = find_device(metric)
    for name, value in state["values"].items():
        owner, _, attribute = name.rpartition(".")
        setattr(metric.get_submodule(owner), attribute, copied(value, device))
    for name, value in state["states"].items():
        is_on_host = isinstance(value, list) and getattr(metric, "compute_on_cpu", False)
        setattr(metric, name, copied(value, torch.device("cpu") if is_on_host else device))
    if has_extra_state(metric):
        metric.set_extra_state(copied(state["extra"], device))
    share_in_groups(metric)


def is_metric(value: object) -> bool:
    """Say whether something is a metric: torchmetrics', or with the same methods."""
    methods = (getattr(value, method, None) for method in ("update", "compute", "reset"))
    return not isinstance(value, type) and all(map(callable, methods))


def stateful(metric: object) -> Stateful:
    """Return an object that has a state of its own, or raise `CheckpointError` where it has none."""
    if not isinstance(metric, Stateful):
        raise CheckpointError(
            f"A {type(metric).__qualname__} has no state that a checkpoint could hold. Give it state_dict(self) and "
            "load_state_dict(self, state_dict), for what it has taken in, or derive it from torchmetrics.Metric."
        )
    return metric


def copied(value: Any, device: torch.device | None) -> Any:
    """Copy what a checkpoint can hold; tensors onto `device`, or where they are."""
    if isinstance(value, Tensor):
        return value.detach().to(device or value.device, copy=True)
    if isinstance(value, list | tuple):
        return type(value)([copied(part, device) for part in value])
    if isinstance(value, dict):
        return type(value)({key: copied(part, device) for key, part in value.items()})
    return value.copy() if isinstance(value, set | np.ndarray) else value


def look_at(metric: nn.Module) -> dict[str, dict[str, Any]]:
    """Sort what a metric holds, or raise `CheckpointError` where it collects what cannot be stored."""
    held: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
    buffers: dict[str, Tensor | None] = {}
    for prefix, module in without_metrics(metric):
        buffers |= {f"{prefix}{name}": value for name, value in module._buffers.items()}  # noqa: SLF001
        held["parts"] |= {f"{prefix}{name}": part for name, part in module._modules.items() if is_metric(part)}  # noqa: SLF001
    declared = getattr(metric, "_defaults", {})
    arguments = constructor_parameters(type(metric))  # type: ignore[arg-type]  # mypy takes modules' classes for unhashable
    for name, value in chain(iterate_attributes(metric), buffers.items()):
        if name in declared:
            held["states"][name] = value
        elif is_storable(value):
            is_argument = name.lstrip("_") in arguments and not isinstance(value, FILLED)
            held["arguments" if is_argument else "values"][name] = value
        elif name in CACHES:
            held["values"][name] = None
        elif found := dict(metrics_in(value, name)):
            held["parts"].update(found)
        elif not has_extra_state(metric):
            check_stays(f"{type(metric).__qualname__}.{name}", value)
    return held


def iterate_attributes(metric: nn.Module) -> Iterator[tuple[str, Any]]:
    """Iterate over a metric's attributes, other than those of every module, and the settings of every metric."""
    from torchmetrics import Metric

    own = vars(metric)
    if isinstance(metric, Metric) and metric._is_synced:  # noqa: SLF001  # then its states are of all processes,
        own = own | (metric._cache or {})  # noqa: SLF001  # and its own in its cache
    not_its = settings_of_every_metric() if isinstance(metric, Metric) else vars(nn.Module()).keys()
    for name, value in own.items():
        if name in ("_update_count", *CACHES) or not (name in not_its or isinstance(value, torch.device)):
            yield name, value


def without_metrics(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Iterate over a metric and those of its modules that are no metrics, each with what names in it begin with."""
    yield prefix, module
    # Unlike `named_modules()`, which hashes metrics by their states: those need not be hashable.
    for name, child in module._modules.items():  # noqa: SLF001
        if child is not None and not is_metric(child):
            yield from without_metrics(child, f"{prefix}{name}.")


def metrics_in(value: object, path: str) -> Iterator[tuple[str, object]]:
    """Iterate over the metrics in an attribute: itself, or those in its containers."""
    if is_metric(value):
        yield path, value
    elif not isinstance(value, nn.Module):
        for key, part in children(value):
            yield from metrics_in(part, f"{path}[{key!r}]")


def has_extra_state(metric: nn.Module) -> bool:
    """Say whether a metric has a state that it alone knows of."""
    return type(metric).get_extra_state is not nn.Module.get_extra_state


def find_device(metric: nn.Module) -> torch.device:
    """Return the device of a metric; the host for one without tensors."""
    from torchmetrics import Metric

    if isinstance(metric, Metric):
        return metric.device
    tensor = next(chain(metric.buffers(), metric.parameters()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def share_in_groups(metric: nn.Module) -> None:
    """Have the metrics of each group in a `MetricCollection` share one state, as large as it may be."""
    from torchmetrics import MetricCollection

    if isinstance(metric, MetricCollection):
        metric.values(copy_state=False)


def follow_steps(metric: nn.Module, parts: Mapping[str, object]) -> None:
    """Have a `MetricTracker` track as many steps as the one whose parts these are; leave other metrics alone."""
    from torchmetrics import MetricTracker

    if isinstance(metric, MetricTracker):
        steps = sum(name.isdigit() for name in parts)
        while metric.n_steps < steps:
            metric.increment()
        for step in range(metric.n_steps, steps, -1):
            delattr(metric, str(step))


@cache
def settings_of_every_metric() -> frozenset[str]:
    """Return the attributes that torchmetrics gives to every metric: how it synchronises, where it is, its defaults."""
    from torchmetrics.metric import CompositionalMetric

    return frozenset(vars(CompositionalMetric(torch.add, 0.0, 0.0)).keys() - {"op", "metric_a", "metric_b"})


@cache
def constructor_parameters(kind: type[Any]) -> frozenset[str]:
    """Return the parameters of a class's constructors, without the attributes that other methods assign."""
    members = [member for owner in kind.__mro__ for member in vars(owner).items() if inspect.isfunction(member[1])]
    makers = [inspect.signature(member).parameters for name, member in members if name == "__init__"]
    codes = [dis.get_instructions(inspect.unwrap(member)) for name, member in members if name != "__init__"]
    assigned = {each.argval.lstrip("_") for code in codes for each in code if each.opname == "STORE_ATTR"}
    return frozenset(name for parameters in makers for name in parameters) - assigned


def is_storable(value: object) -> bool:
    """Say whether a checkpoint can hold a value."""
    try:
        encode(value)
    except CheckpointError:
        return False
    return True


def check_stays(name: str, value: object) -> None:
    """Raise `CheckpointError` for an attribute that cannot be stored, and that changes as it is used."""
    leaves = [part for _, part in children(value)] if isinstance(value, FILLED) else []
    is_collected = isinstance(value, FILLED) and not (leaves and all(map(callable, leaves)))
    if is_collected or isinstance(value, GENERATORS):
        raise CheckpointError(
            f"{name} is a {type(value).__module__}.{type(value).__qualname__} that cannot be stored, and a resumed run "
            "would go on without what is in it. Keep numbers, strings, bytes and tensors in plain lists, tuples, sets "
            "and dictionaries, or give the metric get_extra_state() and set_extra_state()."
        )


def check_form(kind: str, state: object, parts: Iterable[str]) -> None:
    """Raise `CheckpointError` for the state of another kind of metric, or for what `metric_state` does not return."""
    given = state if isinstance(state, dict) else {}
    if given.get("type") != kind:
        raise CheckpointError(
            f"The metric is a {kind}, and the state is that of a {given.get('type')}. Give the run the metrics that it "
            "was saved with, under the same names."
        )
    forms = [given.get(part) for part in parts]
    if not all(isinstance(form, dict) and (parts != PARTS or set(map(type, form)) <= {str}) for form in forms):
        raise CheckpointError(f"The state of the {kind} is damaged: it needs {', '.join(parts)}, each a dictionary.")


def check_made_alike(metric: nn.Module, held: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for the state of a metric that was made in another way."""
    kind = type(metric).__qualname__
    for name in sorted(held["arguments"].keys() & state["arguments"].keys()):
        now, then = held["arguments"][name], state["arguments"][name]
        if not is_same(now, then):
            raise CheckpointError(
                f"{kind}: the state is that of one with {name}={value_text(then)}, and this one has "
                f"{name}={value_text(now)}. {AS_IT_WAS}"
            )
    extra = (["extra"] if has_extra_state(metric) else [], ["extra"] if "extra" in state else [])
    same = {"states": (held["states"], state["states"]), "metrics": (held["parts"], state["parts"]), "rest": extra}
    for what, (mine, its) in same.items():
        if set(mine) != set(its):
            raise CheckpointError(f"{kind}: the state has the {what} {[*its]}, and this one {[*mine]}. {AS_IT_WAS}")
    for name in state["values"].keys() - held["values"].keys():
        # What only updates set is new to this one; what it has already, and as something else, is not replaced.
        if "." in name or name in vars(metric) or not is_storable(getattr(metric, name, None)):
            raise CheckpointError(f"{kind}: the state has a value for {name}, which is none in this one. {AS_IT_WAS}")


def is_same(one: object, other: object) -> bool:
    """Say whether two values that a checkpoint can hold are equal; a NaN equals itself."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
    return encode(one).tree == encode(other).tree
