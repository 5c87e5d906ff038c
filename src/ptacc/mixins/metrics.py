"""Metrics."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ptacc.checkpoint.metric_state import load_metric_state, metric_state
from ptacc.composition.composable import hook
from ptacc.core.batch_hooks import BatchMixin
from ptacc.distributed.process_group import Peers
from ptacc.errors import DataError, OptionError
from ptacc.run.state import StateKey
from ptacc.tensors.structures import map_tensors, to_host
from ptacc.types.aliases import BatchT, OutputT
from ptacc.types.outputs import StepOutput
from ptacc.types.protocols import MetricLike, StateDict
from ptacc.validation import value_text

TRAIN_METRICS: StateKey[MetricStates] = StateKey("train_metrics", each_rank=True)
RESERVED = frozenset({"loss", "eval_loss", "train_loss", "learning_rate"})


class MetricsMixin(BatchMixin[BatchT, OutputT]):
    """Computes metrics over evaluations, and over the training batches of an epoch where asked to.

    States live on the device, and torchmetrics puts the processes' states together when it computes; every sample
    counts once. An object of one's own knows nothing of other processes: there, each process keeps what its metric
    was given, on the host, and when the value is computed every process takes in what all were given, batch by batch.
    For outputs too large for that, derive the metric from `torchmetrics.Metric`.

    Options:
        metrics: Metrics of evaluations by name: torchmetrics, collections of them, or objects of one's own with
            `update`, `compute` and `reset`. A metric that computes several values reports `name/key`.
        train_metrics: Metrics over the training batches of each epoch, reported as `train/name`.

    Hooks: `update_metrics`, `on_eval_batch_end`, `on_batch_end`, `on_evaluation_start`, `on_epoch_start`,
    `compute_metrics`, `compute_train_metrics`, `evaluated_values`, `reported_values`.

    Combines with: everything. The default `update_metrics` is for batches `(inputs, targets)`.

    Example:
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> from ptacc import MetricsMixin, Trainer
        >>> class MyTrainer(MetricsMixin, Trainer): ...
    """

    metrics: Mapping[str, MetricLike] = field(default_factory=dict)
    train_metrics: Mapping[str, MetricLike] = field(default_factory=dict)
    _evaluated: Mapping[str, MetricLike] = field(init=False, default_factory=dict)
    _trained: Mapping[str, MetricLike] = field(init=False, default_factory=dict)

    @override
    def check_options(self) -> None:
        """Refuse names that collide and metrics in two sets."""
        owner = type(self).__name__
        for option, metrics in (("metrics", self.metrics), ("train_metrics", self.train_metrics)):
            check_metrics(owner, option, metrics)
        check_names(owner, self.metrics)
        everyone = [*self.metrics.values(), *self.train_metrics.values()]
        if len({id(metric) for metric in everyone}) < len(everyone):
            twice = next(metric for metric in everyone if sum(metric is other for other in everyone) > 1)
            raise OptionError(
                f"{owner}: one {type(twice).__name__} is given twice, and its state would mix what both see. "
                "Give each place its own: metric.clone()."
            )

    @hook("default")
    def update_metrics(self, batch: BatchT, output: StepOutput[OutputT], metrics: Iterable[MetricLike]) -> None:
        """Take one batch into `metrics`: by default, the outputs and the targets of a batch `(inputs, targets)`.

        Args:
            batch: The batch, on the device.
            output: What the step put out.
            metrics: Those of the evaluation, or those of training.

        Raises:
            DataError: The batch is no pair; override this to say what predictions and targets are.
        """
        if not (isinstance(batch, Sequence) and len(batch) == 2):
            raise DataError(
                f"{type(self).__name__}.update_metrics: a batch is a {type(batch).__name__}, and not a pair (inputs, "
                "targets). Override update_metrics(self, batch, output, metrics) to say what the metrics take."
            )
        for metric in metrics:
            metric.update(output.outputs, batch[1])

    @override
    def on_eval_batch_end(self, batch: BatchT, output: StepOutput[OutputT]) -> None:
        """Update the evaluation's metrics."""
        super().on_eval_batch_end(batch, output)
        self.update_metrics(batch, output, self._evaluated.values())

    @override
    def on_batch_end(self, batch: BatchT, output: StepOutput[OutputT]) -> None:
        """Update the metrics of training."""
        super().on_batch_end(batch, output)
        if self.train_metrics:
            with torch.no_grad():
                self.update_metrics(batch, output, self._trained.values())

    @override
    def on_evaluation_start(self, name: str) -> None:
        """Reset the evaluation's metrics."""
        super().on_evaluation_start(name)
        self._evaluated = started(self.metrics, self.device, self.peers)

    @override
    def on_epoch_start(self) -> None:
        """Reset the metrics of training."""
        super().on_epoch_start()
        self._trained = started(self.train_metrics, self.device, self.peers)
        if self._trained:
            self.run[TRAIN_METRICS] = MetricStates(self._trained)

    @override
    def compute_metrics(self) -> dict[str, float]:
        """Compute the evaluation's metrics over all processes."""
        return super().compute_metrics() | compute(self._evaluated, self.peers)

    @override
    def compute_train_metrics(self) -> dict[str, float]:
        """Compute the metrics of training over all processes."""
        return super().compute_train_metrics() | compute(self._trained, self.peers)

    @override
    def evaluated_values(self) -> frozenset[str]:
        """Report the metrics of evaluations."""
        return super().evaluated_values() | names_of(self.metrics)

    @override
    def reported_values(self) -> frozenset[str]:
        """Report the metrics of training."""
        return super().reported_values() | {f"train/{name}" for name in names_of(self.train_metrics)}


def check_metrics(owner: str, option: str, metrics: object) -> None:
    """Raise `OptionError` for what is no mapping of names to metrics."""
    if not isinstance(metrics, Mapping | nn.ModuleDict):
        raise OptionError(
            f"{owner}({option}={value_text(metrics)}): must be a mapping from names to metrics: "
            f'{option}={{"accuracy": MulticlassAccuracy(10)}}.'
        )
    for name, metric in metrics.items():
        if isinstance(metric, type) or not all(hasattr(metric, method) for method in ("update", "compute", "reset")):
            raise OptionError(
                f"{owner}({option}={{{name!r}: {value_text(metric)}}}): must be a metric: an instance, with update, "
                "compute and reset."
            )


def check_names(owner: str, metrics: Mapping[str, MetricLike]) -> None:
    """Raise `OptionError` for names of metrics that something else is called by, or that collide once spelt out."""
    if taken := RESERVED & metrics.keys():
        raise OptionError(
            f"{owner}(metrics={{{min(taken)!r}: ...}}): every run reports a value of this name already. "
            "Give the metric another name."
        )
    seen: set[str] = set()
    for name, metric in metrics.items():
        spelt = names_of({name: metric})
        if seen & spelt:
            raise OptionError(
                f"{owner}(metrics=...): two metrics report {min(seen & spelt)!r}, one of them in a collection. "
                "Give one of them another name."
            )
        seen |= spelt


def names_of(metrics: Mapping[str, MetricLike]) -> frozenset[str]:
    """Return the names under which metrics are reported: `name/key` for each metric of a collection."""
    names: set[str] = set()
    for name, metric in metrics.items():
        names |= {f"{name}/{key}" for key in metric} if isinstance(metric, nn.ModuleDict) else {name}
    return frozenset(names)


class Recorded:
    """Stands in for a metric that knows nothing of other processes: it takes in what all of them were given.

    Args:
        metric: The metric.
        peers: The processes.
    """

    def __init__(self, metric: MetricLike, peers: Peers) -> None:
        """Start with nothing given."""
        self._metric, self._peers = metric, peers
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


def started(metrics: Mapping[str, MetricLike], device: torch.device, peers: Peers) -> dict[str, MetricLike]:
    """Reset metrics, have their states on `device`, and let those that need it stand in for all processes."""
    for metric in metrics.values():
        metric.reset()
        if isinstance(metric, nn.Module):
            metric.to(device)
    return {
        name: metric if peers.is_alone or synchronises_itself(metric) else Recorded(metric, peers)
        for name, metric in metrics.items()
    }


def synchronises_itself(metric: MetricLike) -> bool:
    """Say whether a metric puts the processes' states together when it computes."""
    from torchmetrics import Metric, MetricCollection

    return isinstance(metric, Metric | MetricCollection)


def compute(metrics: Mapping[str, MetricLike], peers: Peers) -> dict[str, float]:
    """Compute metrics, and read their values from the device."""
    if not peers.is_alone:
        fill_empty_lists(metrics, peers)
    values: dict[str, float] = {}
    with warnings.catch_warnings():
        # A process may have had phantoms only; its empty state is right, and torchmetrics would warn of it.
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric", category=UserWarning)
        for name, metric in metrics.items():
            values |= dict(spell_out(name, metric.compute()))
    return values


def fill_empty_lists(metrics: Mapping[str, MetricLike], peers: Peers) -> None:
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
    forms = peers.gather([(values[0].dtype, values[0].shape[1:]) if values else None for values in held])
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
