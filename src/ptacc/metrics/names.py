"""The metrics among the options of a trainer, and the names by which they are reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import nn

from ptacc.errors import OptionError
from ptacc.metrics.state import iterate_metrics
from ptacc.types.outputs import RESERVED_NAMES
from ptacc.types.protocols import MetricLike
from ptacc.validation import value_text


def check_metrics(owner: str, options: Mapping[str, Mapping[str, MetricLike]]) -> None:
    """Raise `OptionError` for options that are not mappings from names to metrics, and for a metric given twice.

    A metric may be in others: in a collection, a wrapper, or an expression such as `metric * 0.5`. Each of them may
    itself use it more than once.
    """
    for option, metrics in options.items():
        check_mapping(owner, option, metrics)
    entries = [metric for metrics in options.values() for metric in metrics.values()]
    parts_of = [[part for _, part in iterate_metrics({"": entry}) if isinstance(part, MetricLike)] for entry in entries]
    counts = Counter(key for parts in parts_of for key in {*map(id, parts)})
    if repeated := [part for parts in parts_of for part in parts if counts[id(part)] > 1]:
        raise OptionError(
            f"{owner}: one {type(repeated[0]).__name__} is given twice, and its state would mix the data of both "
            "places. Give each place its own: metric.clone()."
        )


def check_mapping(owner: str, option: str, metrics: object) -> None:
    """Raise `OptionError` unless `metrics` is a mapping from names to metrics."""
    if not isinstance(metrics, Mapping | nn.ModuleDict):
        raise OptionError(
            f"{owner}({option}={value_text(metrics)}): must be a mapping from names to metrics: "
            f'{option}={{"accuracy": MulticlassAccuracy(10)}}.'
        )
    for name, metric in metrics.items():
        if isinstance(metric, type) or not isinstance(metric, MetricLike):
            raise OptionError(
                f"{owner}({option}={{{name!r}: {value_text(metric)}}}): must be a metric: an instance, with update, "
                "compute and reset."
            )


def check_names(owner: str, metrics: Mapping[str, MetricLike]) -> None:
    """Raise `OptionError` for names that the trainer reports already, and for names that two metrics report."""
    if taken := RESERVED_NAMES & metrics.keys():
        raise OptionError(
            f"{owner}(metrics={{{min(taken)!r}: ...}}): every run reports a value of this name already. "
            "Give the metric another name."
        )
    counts = Counter(reported for name, metric in metrics.items() for reported in list_metric_names({name: metric}))
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise OptionError(
            f"{owner}(metrics=...): two metrics report {min(repeated)!r}, one of them in a collection. Give one of "
            "them another name."
        )


def list_metric_names(metrics: Mapping[str, MetricLike]) -> frozenset[str]:
    """Return the names under which metrics are reported: `name/key` for each metric of a collection."""
    names: set[str] = set()
    for name, metric in metrics.items():
        names |= {f"{name}/{key}" for key in metric} if isinstance(metric, nn.ModuleDict) else {name}
    return frozenset(names)
