"""Collections, wrappers and metrics of your own resume from a checkpoint; what cannot be stored is refused by name."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import CatMetric, MeanMetric, Metric, MetricCollection, SumMetric
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryPrecision, BinaryROC, MulticlassAccuracy
from typing_extensions import override

from ptacc import CheckpointMixin, MetricsMixin, Trainer
from ptacc.errors import CheckpointError
from ptacc.testing import tiny_data, tiny_parts
from tests.checkpoint.test_packages import (
    BY_NAME,
    bits,
    check_resumes,
    computed,
    data_for,
    feed,
    make,
    states,
    through,
)

pytestmark = pytest.mark.filterwarnings("ignore")


# ---- collections, nested wrappers, and metrics of your own


class Counts:
    total = 0


class Color(Enum):
    RED = 1


class PlainMean:
    """Does not use torchmetrics."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def update(self, found: Tensor, _wanted: Tensor) -> None:
        self.seen.append(float(found.mean()))

    def compute(self) -> float:
        return sum(self.seen)

    def reset(self) -> None:
        self.seen.clear()

    forward = update

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        self.seen = state_dict["seen"]


class Undeclared(Metric):
    """Keeps its state in attributes of many kinds, none of them registered."""

    count = 0
    total: Tensor

    def __init__(self, limit: float | None = None, words: Sequence[int] = ()) -> None:
        super().__init__()
        self.limit = limit
        self.words = Counter(words)
        self.kinds: set[float] = set()
        self.mean = MeanMetric()
        self.choose = len
        self.generator = random.Random(0)
        self.register_buffer("total", torch.zeros(2))

    @override
    def update(self, found: Tensor, wanted: Tensor) -> None:
        self.limit = float(found.max()) if self.limit is None else self.limit
        self.count += 1
        self.words.update(wanted.tolist())
        self.kinds.add(float(found.min()))
        self.mean.update(found)
        self.total = self.total + self.generator.random()

    @override
    def compute(self) -> Any:
        mean = float(self.mean.compute())
        return [self.limit, self.count, self.words[1], *sorted(self.kinds), mean, *self.total.tolist()]

    @override
    def get_extra_state(self) -> Any:
        return self.generator.getstate()

    @override
    def set_extra_state(self, state: Any) -> None:
        self.generator.setstate(state)


class Module(nn.Module):
    """A module with the methods of a metric that is not derived from torchmetrics."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner, self._cache = MeanMetric(), 0  # torchmetrics has an attribute of this name
        self.register_buffer("total", torch.zeros(()))

    def update(self, found: Tensor, _wanted: Tensor) -> None:
        self.inner.update(found)
        self._cache += 1
        self.total += found.sum()

    forward = update

    def compute(self) -> list[float]:
        return [float(self.inner.compute()), self._cache, float(self.total)]

    def reset(self) -> None: ...


def collection(**options: Any) -> MetricCollection:
    return MetricCollection(
        {"a": BinaryAccuracy(), "b": BinaryPrecision(), "c": BinaryAUROC(), "d": BinaryROC()}, **options
    )


MORE: dict[str, Callable[[], Any]] = {
    "groups": collection,
    "groups by name": lambda: collection(compute_groups=[["a", "b"], ["c", "d"]]),
    "no groups": lambda: collection(compute_groups=False),
    "composition": lambda: (BinaryAccuracy() + BinaryPrecision()) * torch.tensor(2.0),
    "not a number": lambda: MeanMetric(nan_strategy=float("nan")),
    "plain": PlainMean,
    "undeclared": Undeclared,
    "module": Module,
}


@pytest.mark.parametrize("how", ["uuuuu", "ufufu"])
@pytest.mark.parametrize("name", MORE)
def test_a_metric_made_of_metrics_resumes(name: str, how: str, tmp_path: Path) -> None:
    through_run, late = check_resumes(MORE[name], BY_NAME["Binary"], tmp_path, how)
    assert computed(late) != computed(through_run)


# ---- what a state holds


@pytest.mark.parametrize("name", ["aggregation.MeanMetric", "collections.MetricCollection", "wrappers.running.Running"])
def test_a_metric_without_updates_resumes(name: str, tmp_path: Path) -> None:
    expected, resumed = make(name), make(name)
    states(resumed).load_state_dict(through(tmp_path, states(make(name))))
    assert bits(states(resumed).state_dict()) == bits(states(expected).state_dict())
    feed([expected, resumed], data_for(name), range(2), "uu")
    assert computed(resumed) == computed(expected)


class Described(SumMetric):
    @override
    def compute(self) -> Any:
        return {"value": self.sum_value, "by": object}


def test_a_computed_value_is_computed_again(tmp_path: Path) -> None:
    metric, resumed = Described(), Described()
    metric.update(2.0)
    metric.compute()
    states(resumed).load_state_dict(through(tmp_path, states(metric)))
    assert resumed.compute()["value"] == 2


def test_a_synchronised_metric_keeps_the_states_of_its_rank() -> None:
    metric, resumed = SumMetric(), SumMetric()
    metric.update(3.0)
    metric.sync(dist_sync_fn=lambda value, group: [value, value], distributed_available=lambda: True)
    assert metric.sum_value == 6
    states(resumed).load_state_dict(states(metric).state_dict())
    assert resumed.compute() == 3


def test_the_metrics_of_a_compute_group_share_their_state_at_once(tmp_path: Path) -> None:
    saved, resumed = collection(), collection()
    feed([saved], BY_NAME["Binary"], range(1), "u")
    states(resumed).load_state_dict(through(tmp_path, states(saved)))
    assert resumed.get_submodule("a").tp is resumed.get_submodule("b").tp
    feed([resumed], BY_NAME["Binary"], range(1), "u")
    assert resumed.compute_groups == {0: ["a", "b"], 1: ["c", "d"]}
    assert [metric.update_count for metric in resumed.values(copy_state=False)] == [2, 2, 2, 2]


def test_tensors_are_moved_to_the_device_of_the_metric(tmp_path: Path) -> None:
    saved, resumed = CatMetric(), CatMetric().to("meta")
    saved.update(torch.ones(2))
    states(resumed).load_state_dict(through(tmp_path, states(saved)))
    assert resumed.metric_state["value"][0].is_meta


def test_saving_leaves_the_metric_as_it_is() -> None:
    metric = SumMetric()
    metric.persistent(False)
    before = dict(vars(metric))
    states(metric).state_dict()
    assert vars(metric) == before
    assert metric.state_dict() == {}


# ---- what is refused, and when


class Held(SumMetric):
    """Has an attribute that cannot be stored: from the start, or from an update on."""

    def __init__(self, first_update: int) -> None:
        super().__init__()
        self.num_updates = 0
        self.first_update = first_update
        self.held = Counts() if first_update == 0 else None

    @override
    def update(self, value: float | Tensor, _targets: Tensor | None = None) -> None:
        super().update(value)
        self.num_updates += 1
        if self.num_updates == self.first_update:
            self.held = Counts()


class SavedFirst(CheckpointMixin, MetricsMixin, Trainer): ...


class MeasuredFirst(MetricsMixin, CheckpointMixin, Trainer): ...


@pytest.mark.parametrize("trainer_class", [SavedFirst, MeasuredFirst])
@pytest.mark.parametrize(("first_update", "steps"), [(0, 0), (1, 1)])
def test_a_run_that_could_not_be_saved_is_refused_at_its_start(
    trainer_class: Any, first_update: int, steps: int, tmp_path: Path
) -> None:
    trainer = trainer_class(**tiny_parts(), train_metrics={"sum": Held(first_update)}, checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"Held.held is a .*Counts that cannot be stored"):
        trainer.train(tiny_data(), num_epochs=1)
    assert trainer.progress.steps == steps


def test_a_run_that_is_not_saved_needs_no_state() -> None:
    class Measured(MetricsMixin, Trainer): ...

    trainer = Measured(**tiny_parts(), train_metrics={"sum": Held(0)}, metrics={"sum": Held(1)})
    assert "train/sum" in trainer.train(tiny_data(), num_epochs=1)[-1].values()


MISMATCHES: list[tuple[Callable[[], Any], Callable[[], Any], str]] = [
    (SumMetric, MeanMetric, "is a MeanMetric, and the state is that of a SumMetric"),
    (SumMetric, PlainMean, "is a PlainMean, and the state is that of a SumMetric"),
    (lambda: MetricCollection({"a": SumMetric()}), lambda: MetricCollection({"a": MeanMetric()}), "of a SumMetric"),
    (
        lambda: MetricCollection([SumMetric()]),
        lambda: MetricCollection([MeanMetric()]),
        r"metric.SumMetric'\], and the run",
    ),
    (
        lambda: MulticlassAccuracy(3),
        lambda: MulticlassAccuracy(3, average="micro"),
        "='macro'.* average='micro'",
    ),
    (lambda: BinaryROC(thresholds=5), BinaryROC, "thresholds=Tensor.* thresholds=None"),
    (lambda: BinaryROC(thresholds=5), lambda: BinaryROC(thresholds=6), "thresholds="),
    (Undeclared, type("Undeclared", (SumMetric,), {}), r"metric.mean'\], and the run"),
    (type("SumMetric", (Module,), {"inner": None}), SumMetric, "the run"),
    (
        lambda: type("BinaryAUROC", (BinaryAccuracy,), {})(validate_args=False),
        BinaryAUROC,
        "the state lacks preds, target",
    ),
    (lambda: MeanMetric(nan_strategy=float("nan")), MeanMetric, "nan_strategy=nan.* nan_strategy='warn'"),
]


@pytest.mark.parametrize(("saved", "made", "message"), MISMATCHES)
def test_the_state_of_another_metric_is_refused(saved: Any, made: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        states(made()).load_state_dict(through(tmp_path, states(saved())))


@pytest.mark.parametrize(
    "values",
    [{"_modules": {}}, {"compute": 1}, {"x.y": 1}, {"__dict__": {}}, {3: 1}, [], {"sum_value": torch.ones(())}],
)
def test_a_state_that_no_metric_returned_is_refused(values: Any) -> None:
    state = states(SumMetric()).state_dict()["metric"]
    with_values = state["values"] | values if isinstance(values, dict) and "sum_value" not in values else values
    for invalid in (state | {"values": with_values}, {"type": "SumMetric"}, values):
        with pytest.raises(CheckpointError, match="SumMetric"):
            states(SumMetric()).load_state_dict({"metric": invalid})
    with pytest.raises(CheckpointError, match="PlainMean"):
        states(PlainMean()).load_state_dict({"metric": state})


def test_an_object_without_a_state_is_refused() -> None:
    class Stateless(PlainMean):
        state_dict = None  # type: ignore[assignment]

    with pytest.raises(CheckpointError, match=r"A .*Stateless has no state .* Give it state_dict\(self\)"):
        states(Stateless()).state_dict()


@pytest.mark.parametrize(
    "value",
    [
        *(defaultdict(int), [object()], {1: {2: object()}}, random.Random(0), torch.Generator()),
        *(Counts(), PlainMean(), [MeanMetric()], {"mean": PlainMean()}, (MeanMetric(), len), (len, Counts())),
    ],
)
def test_an_attribute_that_cannot_be_stored_is_refused_before_the_first_update(value: object) -> None:
    metric = SumMetric()
    metric.held = value
    with pytest.raises(CheckpointError, match=r"SumMetric.held is a .* that cannot be stored.* get_extra_state"):
        states(metric).state_dict()


def test_an_attribute_that_update_makes_is_refused() -> None:
    metric = SumMetric()
    before = states(metric)
    before.state_dict()
    metric.held = Counts()
    with pytest.raises(CheckpointError, match=r"SumMetric.held is a .*Counts that cannot be stored"):
        before.state_dict()


def test_a_tracker_that_adds_metrics_is_refused() -> None:
    tracker = make("wrappers.tracker.MetricTracker")
    before = states(tracker)
    tracker.increment()
    with pytest.raises(CheckpointError, match=r"added or removed during a run cannot be resumed: \['metric.1'\]"):
        before.state_dict()


def test_functions_enums_and_devices_come_with_the_metric() -> None:
    metric = SumMetric()
    metric.functions, metric.where, metric.kind = [len, SumMetric], torch.device("cpu"), Color.RED
    assert states(metric).state_dict() == states(SumMetric()).state_dict()
