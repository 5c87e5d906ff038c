"""The states of metrics, for checkpoints: a resumed run continues with them as if it had not been interrupted.

torchmetrics' own `state_dict()` omits nearly all of a state: states are not persistent by default, counts never are. A
state is therefore made of the attributes of each metric, and of the metrics in it, by their paths:
```
{"loss": {"type": "BootStrapper", "values": {"_update_count": 3, ...}, "arguments": {"num_bootstraps": 10, ...}},
 "loss.metrics.0": {"type": "MeanSquaredError", "values": {"sum_squared_error": ..., "total": ..., ...}, ...}, ...}
```

- `values` are registered states, counts, buffers, and all other attributes that can be stored.
- `arguments` have the name of a constructor parameter and have not changed since the start of the run. They are not
  loaded, but compared with those of the metric that resumes.

Functions, other callables, enum members and torchmetrics' own helper objects come with the metric. Any other attribute
is refused by name, unless the metric stores it through `get_extra_state()` and `set_extra_state()`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from copy import deepcopy
from enum import Enum
from functools import cache
from typing import Any, Final

import torch
from torch import nn

from ptacc.errors import CheckpointError
from ptacc.serialization.json_codec import encode
from ptacc.tensors.structures import as_bytes, children, map_tensors
from ptacc.types.protocols import MetricLike, StateDict, Stateful
from ptacc.validation import value_text

EXTRA: Final = "_extra_state"
"""What torch calls the result of `get_extra_state()`."""
REMEDY: Final = "Create the metrics as in the saved run, or resume without their state."


class MetricStates:
    """The states of metrics. Create it when they are reset, at the start of a run.

    Args:
        metrics: Metrics by name: of torchmetrics, with collections and wrappers; other modules; or objects with
            `state_dict` and `load_state_dict`.

    Example:
        >>> from torchmetrics import SumMetric
        >>> metric = SumMetric()
        >>> states = MetricStates({"sum": metric})
        >>> metric.update(3.0)
        >>> states.state_dict()["sum"]["values"]["sum_value"]
        tensor(3.)
    """

    def __init__(self, metrics: Mapping[str, object]) -> None:
        self._metrics = metrics
        self._arguments = {path: deepcopy(group_attributes(metric)[1]) for path, metric in iterate_metrics(metrics)}

    def state_dict(self) -> StateDict:
        """Return the states. They refer to the metrics' tensors and lists: encode them before the next update.

        Raises:
            CheckpointError: A metric has no state, or an attribute that cannot be stored.
        """
        share_group_states(self._metrics)
        metrics = dict(iterate_metrics(self._metrics))
        if changed := sorted(metrics.keys() ^ self._arguments.keys()):
            raise CheckpointError(f"Metrics that are added or removed during a run cannot be resumed: {changed}.")
        return {path: metric_state(metric, self._arguments[path]) for path, metric in metrics.items()}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load copies of states; tensors are moved to the device of each metric.

        Raises:
            CheckpointError: A state is that of another metric, or of one with other arguments.
        """
        if problem := self.difference(state_dict):
            raise CheckpointError(problem)
        for path, metric in iterate_metrics(self._metrics):
            load_metric_state(metric, deepcopy(state_dict[path]["values"]))
        share_group_states(self._metrics)

    def difference(self, state_dict: StateDict) -> str:
        """Describe why these metrics cannot continue with a state, empty if they can."""
        metrics = dict(iterate_metrics(self._metrics))
        if metrics.keys() != state_dict.keys():
            return f"The state has the metrics {[*state_dict]}, and the run {[*metrics]}. {REMEDY}"
        differences = (describe_difference(metric, state_dict[path]) for path, metric in metrics.items())
        return next(filter(None, differences), "")


def iterate_metrics(metrics: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Iterate over metrics, the metrics in them, and modules with buffers in them, each with its path."""
    for name, metric in metrics.items():
        if isinstance(metric, MetricLike) or getattr(metric, "_buffers", None):
            yield f"{prefix}{name}", metric
        if isinstance(metric, nn.Module):  # `named_modules()` would hash the states of metrics
            yield from iterate_metrics(metric._modules, f"{prefix}{name}.")  # noqa: SLF001


def share_group_states(metrics: Mapping[str, object]) -> None:
    """Make the metrics of each compute group in a collection share one state, as after an update."""
    from torchmetrics import MetricCollection

    for _, metric in iterate_metrics(metrics):
        if isinstance(metric, MetricCollection):
            metric.values(copy_state=False)


# ---- one metric


def group_attributes(metric: object) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return a metric's values, its constructor arguments, and its attributes that cannot be stored."""
    if not isinstance(metric, nn.Module):
        return {}, {}, {}
    own = list_attributes(metric)
    parameters = list_parameters(type(metric))  # type: ignore[arg-type]  # mypy takes classes of modules for unhashable
    parameters -= getattr(metric, "_defaults", {}).keys()
    others = {name: value for name, value in own.items() if not _is_storable(value)}
    arguments = {name: own[name] for name in own if name not in others and name.lstrip("_") in parameters}
    values = {name: own[name] for name in own if name not in others and name not in arguments}
    if type(metric).get_extra_state is nn.Module.get_extra_state:
        return values, arguments, others
    return values | {EXTRA: metric.get_extra_state()}, arguments, {}


def list_attributes(metric: nn.Module) -> dict[str, Any]:
    """Return the attributes of a metric that can be part of its state; of a network, the buffers."""
    from torchmetrics import Metric

    own, common = vars(metric) if isinstance(metric, MetricLike) else {}, frozenset(vars(nn.Module()))
    if isinstance(metric, Metric):
        common = list_common_attributes()
        if metric._is_synced:  # noqa: SLF001  # the states of this rank are in the cache
            own = own | (metric._cache or {})  # noqa: SLF001
    return {name: value for name, value in own.items() if name not in common} | metric._buffers  # noqa: SLF001


@cache
def list_common_attributes() -> frozenset[str]:
    """List the attributes that every metric of torchmetrics has and that are not part of its state."""
    from torchmetrics.metric import CompositionalMetric

    state = {"_update_count", "op", "metric_a", "metric_b"}
    return frozenset(vars(CompositionalMetric(torch.add, 0.0, 0.0)).keys() - state)


@cache
def list_parameters(cls: type) -> frozenset[str]:
    """List the parameters of a class's constructors, inherited ones included."""
    constructors = [vars(base)["__init__"] for base in cls.__mro__ if inspect.isfunction(vars(base).get("__init__"))]
    return frozenset(name for constructor in constructors for name in inspect.signature(constructor).parameters)


def _is_storable(value: object) -> bool:
    try:
        encode(value)
    except CheckpointError:
        return False
    return not isinstance(value, torch.device)  # a resumed run may have another


def is_constant(value: object) -> bool:
    """Whether an object that cannot be stored comes with the metric, and `update()` does not change it."""
    if isinstance(value, MetricLike) and not isinstance(value, type):
        return False
    parts = [part for _, part in children(value)]
    is_known = (
        callable(value) or isinstance(value, Enum | torch.device) or type(value).__module__.startswith("torchmetrics.")
    )
    return is_known or (bool(parts) and all(map(is_constant, parts)))


def is_same(one: object, other: object) -> bool:
    """Whether two values that can be stored are equal to the bit; NaN equals itself."""
    first, second = encode(one), encode(other)
    tensors = [[(t.dtype, t.shape, as_bytes(t)) for t in each.tensors.values()] for each in (first, second)]
    return repr(first.tree) == repr(second.tree) and tensors[0] == tensors[1]


def metric_state(metric: object, initial_arguments: Mapping[str, object]) -> StateDict:
    """Return the state of one metric, without that of the metrics in it."""
    kind = type(metric).__qualname__
    if not isinstance(metric, nn.Module):
        if not isinstance(metric, Stateful):
            raise CheckpointError(
                f"A {kind} has no state that a checkpoint could hold. Give it state_dict(self) and "
                "load_state_dict(self, state_dict), or derive it from torchmetrics.Metric."
            )
        return {"type": kind, "values": metric.state_dict(), "arguments": {}}
    values, arguments, others = group_attributes(metric)
    for name, value in others.items():
        if not is_constant(value):
            raise CheckpointError(
                f"{kind}.{name} is a {type(value).__module__}.{type(value).__qualname__} that cannot be stored, and a "
                "resumed run would lose what is in it. Keep numbers, strings, bytes and tensors in plain lists, "
                "tuples, sets and dictionaries, keep metrics in nn.ModuleList or nn.ModuleDict, or give the metric "
                "get_extra_state() and set_extra_state()."
            )
    unchanged = {name: value for name, value in arguments.items() if is_same(value, initial_arguments.get(name))}
    changed = {name: value for name, value in arguments.items() if name not in unchanged}
    return {"type": kind, "values": values | changed, "arguments": unchanged}


def describe_difference(metric: object, state: Any) -> str:
    """Describe why a metric cannot continue with a state, empty if it can."""
    kind, (values, arguments, _) = type(metric).__qualname__, group_attributes(metric)
    if not isinstance(state, dict) or not all(isinstance(state.get(part), dict) for part in ("values", "arguments")):
        return f"The state of the {kind} is invalid: it needs values and arguments, two dictionaries."
    if state.get("type") != kind:
        return f"The metric is a {kind}, and the state is that of a {state.get('type')}. {REMEDY}"
    for name in sorted(arguments.keys() & state["arguments"].keys()):
        now, saved = arguments[name], state["arguments"][name]
        if not is_same(now, saved):
            return (
                f"{kind}: the state is that of one with {name}={value_text(saved)}, and this one has "
                f"{name}={value_text(now)}. {REMEDY}"
            )
    if missing := sorted(values.keys() - state["values"].keys()):
        return f"{kind}: the state lacks {', '.join(missing)}. {REMEDY}"
    if isinstance(metric, nn.Module):
        for name in state["values"].keys() - values.keys() - arguments.keys():
            # `update()` may set new attributes, and no attribute of another kind is replaced.
            is_new = str(name).isidentifier() and name not in vars(metric)
            if not (is_new and _is_storable(getattr(metric, name, None))):
                return f"{kind}: the state has the value {name}, and this one cannot have it. {REMEDY}"
    return ""


def load_metric_state(metric: object, values: StateDict) -> None:
    """Load the values of one metric's state."""
    if not isinstance(metric, nn.Module):
        metric.load_state_dict(values)  # type: ignore[attr-defined]  # it has been saved
        return
    tensors = (*metric.buffers(), *metric.parameters())
    device = getattr(metric, "device", tensors[0].device if tensors else "cpu")
    for name, value in map_tensors(lambda tensor: tensor.detach().to(device), values).items():
        if name == EXTRA:
            metric.set_extra_state(value)
        else:
            setattr(metric, name, value)
