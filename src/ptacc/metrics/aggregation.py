"""Metrics over all ranks: each sample counts once, whatever the number of ranks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, SupportsFloat

import numpy as np
import torch
from torch import Tensor, nn

from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import OptionError
from ptacc.tensors.structures import map_tensors, to_host
from ptacc.types.protocols import MetricLike, StateDict
from ptacc.validation import value_text


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
        """Update the metric with the batches of all ranks, in the order of the data, and compute it. A collective."""
        for batches in zip_longest(*self._distributed.gather(self._batches)):
            for args, kwargs in filter(None, batches):
                self._metric.update(*args, **kwargs)
        return self._metric.compute()

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
    if not distributed.is_single_process:
        pad_empty_list_states(metrics, distributed)
    values: dict[str, float] = {}
    with warnings.catch_warnings():
        # A rank with padding batches only has had no update. Its empty state is right, but torchmetrics would warn.
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric", category=UserWarning)
        for name, metric in metrics.items():
            for full_name, value in flatten_value(name, metric.compute()):
                if full_name in values:
                    raise OptionError(f"Two values of metrics are called {full_name!r}. Give a metric another name.")
                values[full_name] = value
    return values


def pad_empty_list_states(metrics: Mapping[str, MetricLike], distributed: DistributedRuntime) -> None:
    """Append an empty tensor to each list state that is empty on this rank, but not on all.

    torchmetrics gathers nothing for an empty list. A rank with one would call fewer collectives than the others, and
    receive the values of another state.
    """
    from torchmetrics import Metric

    modules = [part for metric in metrics.values() if isinstance(metric, nn.Module) for part in metric.modules()]
    lists = [
        (metric, name)
        for metric in modules
        if isinstance(metric, Metric)
        for name, default in metric._defaults.items()  # noqa: SLF001  # torchmetrics has no public list of them
        if isinstance(default, list)
    ]
    states: list[list[Tensor]] = [getattr(metric, name) for metric, name in lists]
    layouts = distributed.gather([(state[0].dtype, state[0].shape[1:]) if state else None for state in states])
    for (metric, _), state, over_ranks in zip(lists, states, zip(*layouts, strict=True), strict=True):
        layout = next(filter(None, over_ranks), None)
        if layout is not None and not state:
            state.append(torch.empty((0, *layout[1]), dtype=layout[0], device=metric.device))


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
