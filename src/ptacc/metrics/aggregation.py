"""Metrics over all ranks: each sample counts once, whatever the number of ranks."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, SupportsFloat, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import OptionError
from ptacc.metrics.state import iterate_metrics, share_group_states
from ptacc.tensors.structures import map_tensors, to_device, to_host
from ptacc.types.protocols import MetricLike, StateDict
from ptacc.validation import value_text

TorchMetric: TypeAlias = Any
"""A `Metric` of torchmetrics, whose import would double the time of every user's type check.

mypy skips imports in functions of installed packages, but not in generator functions.
"""


class GatheredMetric:
    """Wraps a metric that has no distributed support: every rank computes it from the batches of all ranks.

    Args:
        metric: The metric.
        distributed: The ranks.
    """

    def __init__(self, metric: MetricLike, distributed: DistributedRuntime) -> None:
        self._metric, self._distributed = metric, distributed
        self._batches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Store the arguments of an update, with their tensors on the host."""
        self._batches.append(map_tensors(to_host, (args, kwargs)))

    def compute(self) -> Any:
        """Update the metric with the batches of all ranks, in the order of the data, and compute it. A collective.

        Metrics of torchmetrics within it have the batches of all ranks as well, and must not add up their states.
        """
        from torchmetrics import Metric

        for batches in zip_longest(*self._distributed.gather(self._batches)):
            for args, kwargs in filter(None, batches):
                self._metric.update(*args, **kwargs)
        sync, Metric.sync = Metric.sync, do_nothing  # type: ignore[method-assign]
        try:
            return self._metric.compute()
        finally:
            Metric.sync = sync  # type: ignore[method-assign]

    def reset(self) -> None:
        """Discard all batches."""
        self._batches.clear()
        self._metric.reset()

    def state_dict(self) -> StateDict:
        """Return the batches of this rank."""
        return {"batches": list(self._batches)}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load the batches of this rank."""
        self._batches = list(state_dict["batches"])


def do_nothing(*_: Any, **__: Any) -> None:
    """Take any arguments."""


def prepare_metrics(
    metrics: Mapping[str, MetricLike], device: torch.device, distributed: DistributedRuntime
) -> dict[str, MetricLike]:
    """Reset metrics, move them to a device, and wrap those that need it in a `GatheredMetric`."""
    from torchmetrics import Metric, MetricCollection

    prepared: dict[str, MetricLike] = {}
    for name, metric in metrics.items():
        metric.reset()
        if isinstance(metric, nn.Module):
            metric.to(device)
        is_synced = distributed.is_single_process or isinstance(metric, Metric | MetricCollection)
        prepared[name] = metric if is_synced else GatheredMetric(metric, distributed)
    return prepared


def compute_metrics(metrics: Mapping[str, MetricLike], distributed: DistributedRuntime) -> dict[str, float]:
    """Compute metrics over all ranks, as numbers by name. A collective."""
    values: dict[str, float] = {}
    with warnings.catch_warnings(), synced_states(metrics, distributed):
        # A rank with padding batches only has had no update. Its empty state is right, but torchmetrics would warn.
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric", category=UserWarning)
        for name, metric in metrics.items():
            for full_name, value in flatten_value(name, metric.compute()):
                if full_name in values:
                    raise OptionError(f"Two values of metrics are called {full_name!r}. Give a metric another name.")
                values[full_name] = value
    return values


@contextlib.contextmanager
def synced_states(metrics: Mapping[str, MetricLike], distributed: DistributedRuntime) -> Generator[None]:
    """Prepare states so that torchmetrics, within the block, computes metrics over all ranks. A collective.

    torchmetrics gathers the tensors of a state one by one, as many and of the same dimensions on all ranks. A list that
    it does not concatenate first, such as one entry per sample, may be longer on one rank than on another: a metric
    with such a list has the states of all ranks, and its own again after the block.
    """
    if distributed.is_single_process:
        yield
        return
    share_group_states(metrics)
    parts = list_metrics(metrics)
    match_layouts(parts, distributed)
    gathered = [
        metric
        for metric in parts
        if metric._to_sync  # noqa: SLF001
        and any(is_list and not is_cat for _, is_list, is_cat in list_states(metric))
    ]
    own = [{name: getattr(metric, name) for name, _, _ in list_states(metric)} for metric in gathered]
    over_ranks = distributed.gather(map_tensors(to_host, own)) if gathered else []
    try:
        for metric, *states in zip(gathered, *over_ranks, strict=True):
            for name, reduction in metric._reductions.items():  # noqa: SLF001
                device = torch.device("cpu") if metric.compute_on_cpu else metric.device
                setattr(metric, name, to_device(reduce_states([state[name] for state in states], reduction), device))
            metric._to_sync = False  # noqa: SLF001
        yield
    finally:
        for metric, state in zip(gathered, own, strict=True):
            metric._to_sync = True  # noqa: SLF001
            for name, value in state.items():
                setattr(metric, name, value)


def list_metrics(metrics: Mapping[str, MetricLike]) -> list[TorchMetric]:
    """Return the metrics of torchmetrics, also those within others."""
    from torchmetrics import Metric

    return [metric for _, metric in iterate_metrics(metrics) if isinstance(metric, Metric)]


def list_states(metric: TorchMetric) -> list[tuple[str, bool, bool]]:
    """Return the states of a metric: the name, whether it is a list, and whether its tensors are concatenated."""
    from torchmetrics.utilities import dim_zero_cat

    reductions = metric._reductions  # noqa: SLF001  # torchmetrics has no public names for these
    defaults = metric._defaults.items()  # noqa: SLF001
    return [(name, isinstance(default, list), reductions[name] is dim_zero_cat) for name, default in defaults]


def reduce_states(states: Sequence[Any], reduction: Callable[[Any], Any] | None) -> Any:
    """Combine the states of all ranks as torchmetrics does. The entries of lists alternate, as batches do."""
    if isinstance(states[0], list):
        joined = [part for parts in zip_longest(*states) for part in parts if part is not None]
        return reduction(joined) if reduction is not None and joined else joined
    stacked = torch.stack(list(states))
    return stacked if reduction is None else reduction(stacked)


def match_layouts(metrics: Sequence[TorchMetric], distributed: DistributedRuntime) -> None:
    """Give the states of ranks without an update the dimensions that they have on other ranks. A collective.

    A list that is empty on this rank but not on all gets an empty tensor: torchmetrics gathers nothing for an empty
    list. A tensor whose first update adds dimensions to it, such as one value per output, is expanded. A rank would
    otherwise call other collectives than the others, and receive the values of another state.
    """
    places = [(metric, *state) for metric in metrics for state in list_states(metric)]
    layouts = distributed.gather([describe_layout(metric, getattr(metric, name)) for metric, name, *_ in places])
    for (metric, name, is_list, is_cat), over_ranks in zip(places, zip(*layouts, strict=True), strict=True):
        state, layout = getattr(metric, name), next(filter(None, over_ranks), None)
        if layout is None:
            continue
        dtype, shape = layout
        if not is_list:
            if not metric.update_count and (state.dtype, state.shape) != layout:
                setattr(metric, name, state.to(dtype).expand(shape).clone())
        elif is_cat and not state:
            state.append(torch.empty((0, *shape[1:]), dtype=dtype, device=metric.device))


def describe_layout(metric: TorchMetric, state: Any) -> tuple[torch.dtype, torch.Size] | None:
    """Return the dtype and shape of a state, of a list those of its first tensor; None before the first update."""
    if isinstance(state, list):
        state = state[0] if state else None
    elif not metric.update_count:
        return None
    return (state.dtype, state.shape) if isinstance(state, Tensor) else None


def flatten_value(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Iterate over the numbers in the value of a metric: `name`, or `name/key` for each of several. None is NaN.

    Raises:
        OptionError: A value is not a number, such as a string.

    Example:
        >>> dict(flatten_value("f1", {"micro": torch.tensor(0.5), "each": torch.tensor([0.25, 0.75])}))
        {'f1/micro': 0.5, 'f1/each/0': 0.25, 'f1/each/1': 0.75}
    """
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from flatten_value(f"{name}/{key}", part)
    elif isinstance(value, Tensor | np.ndarray | np.generic):
        yield from flatten_value(name, value.tolist())  # one copy from the device
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for index, part in enumerate(value):
            yield from flatten_value(f"{name}/{index}", part)
    elif value is None:
        yield name, math.nan
    elif isinstance(value, SupportsFloat):
        yield name, float(value)
    else:
        raise OptionError(
            f"The metric {name!r} gave a {type(value).__name__}, {value_text(value)}. The value of a metric must be a "
            "number, None for NaN, or several of them in tensors, arrays, lists or dictionaries."
        )
