"""Metrics over processes: each sample counts once, on any number of ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from ptacc.distributed.process_group import DistributedRuntime
from ptacc.metrics.state import load_metric_state, metric_state
from ptacc.tensors.structures import map_tensors, to_host
from ptacc.types.protocols import MetricLike, StateDict


class GatheredMetric:
    """Stands in for a metric that knows nothing of other processes: it takes in what all of them were given.

    Args:
        metric: The metric.
        distributed: The processes.
    """

    def __init__(self, metric: MetricLike, distributed: DistributedRuntime) -> None:
        """Start with nothing given."""
        self._metric, self._peers = metric, distributed
        self._given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Keep what the metric is given, on the host."""
        self._given.append(map_tensors(to_host, (args, kwargs)))

    def compute(self) -> Any:
        """Give the metric the batches of all processes, in the order of the data, and compute it."""
        for batches in zip_longest(*self._peers.gather(self._given)):
            for args, kwargs in filter(None, batches):
                self._metric.update(*args, **kwargs)
        return self._metric.compute()

    def reset(self) -> None:
        """Forget what was given."""
        self._given.clear()
        self._metric.reset()

    def state_dict(self) -> StateDict:
        """Return what this process's metric was given."""
        return {"given": list(self._given)}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Go on from what it was given."""
        self._given = list(state_dict["given"])


@dataclass(frozen=True)
class MetricStates:
    """The states of metrics that are under way, as a checkpoint holds them.

    Args:
        metrics: The metrics by name.
    """

    metrics: Mapping[str, MetricLike]

    def state_dict(self) -> StateDict:
        """Return what each metric has taken in."""
        return {name: metric_state(metric) for name, metric in self.metrics.items()}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Go on from that."""
        for name, metric in self.metrics.items():
            load_metric_state(metric, state_dict[name])


def started(
    metrics: Mapping[str, MetricLike], device: torch.device, distributed: DistributedRuntime
) -> dict[str, MetricLike]:
    """Reset metrics, have their states on `device`, and let those that need it stand in for all processes."""
    for metric in metrics.values():
        metric.reset()
        if isinstance(metric, nn.Module):
            metric.to(device)
    return {
        name: metric
        if distributed.is_single_process or synchronises_itself(metric)
        else GatheredMetric(metric, distributed)
        for name, metric in metrics.items()
    }


def synchronises_itself(metric: MetricLike) -> bool:
    """Say whether a metric puts the processes' states together when it computes."""
    from torchmetrics import Metric, MetricCollection

    return isinstance(metric, Metric | MetricCollection)


def compute(metrics: Mapping[str, MetricLike], distributed: DistributedRuntime) -> dict[str, float]:
    """Compute metrics, and read their values from the device."""
    if not distributed.is_single_process:
        fill_empty_lists(metrics, distributed)
    values: dict[str, float] = {}
    with warnings.catch_warnings():
        # A process may have had phantoms only; its empty state is right, and torchmetrics would warn of it.
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric", category=UserWarning)
        for name, metric in metrics.items():
            values |= dict(spell_out(name, metric.compute()))
    return values


def fill_empty_lists(metrics: Mapping[str, MetricLike], distributed: DistributedRuntime) -> None:
    """Put an empty tensor where a process has nothing in a list that others have: torchmetrics would leave it out.

    It would then make fewer collectives than they, each of which takes the numbers of the next.
    """
    from torchmetrics import Metric

    modules = [part for metric in metrics.values() if isinstance(metric, nn.Module) for part in metric.modules()]
    lists = [
        (metric, name)
        for metric in modules
        if isinstance(metric, Metric)
        for name, default in metric._defaults.items()  # noqa: SLF001  # where torchmetrics says which are lists
        if isinstance(default, list)
    ]
    held: list[list[Tensor]] = [getattr(metric, name) for metric, name in lists]
    forms = distributed.gather([(values[0].dtype, values[0].shape[1:]) if values else None for values in held])
    for (metric, _), values, known in zip(lists, held, zip(*forms, strict=True), strict=True):
        form = next(filter(None, known), None)
        if form is not None and not values:
            values.append(torch.empty((0, *form[1]), dtype=form[0], device=metric.device))


def spell_out(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Iterate over the numbers in a metric's value: itself, or `name/key` for each of several.

    Example:
        >>> dict(spell_out("f1", {"micro": torch.tensor(0.5), "each": torch.tensor([0.25, 0.75])}))
        {'f1/micro': 0.5, 'f1/each/0': 0.25, 'f1/each/1': 0.75}
    """
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from spell_out(f"{name}/{key}", part)
    elif isinstance(value, Tensor) and value.dim() == 0:
        yield name, float(value)
    elif isinstance(value, Tensor | Sequence):
        for index, part in enumerate(value):
            yield from spell_out(f"{name}/{index}", part)
    else:
        yield name, float(value)
