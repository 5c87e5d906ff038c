"""Metrics in each other, and metrics of one's own, go on from a checkpoint as if nothing had been."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import CatMetric, MeanMetric, Metric, MetricCollection, MetricTracker, SumMetric
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryPrecision, BinaryROC, MulticlassAccuracy
from typing_extensions import override

from ptacc.errors import CheckpointError
from ptacc.metrics.state import load_metric_state, metric_state
from tests.checkpoint.test_packages import BY_NAME, bits, check_goes_on, computed, data_for, feed, make, rand, through

pytestmark = pytest.mark.filterwarnings("ignore")


# ---- collections, wrappers in wrappers, and metrics of one's own


class PlainMean:
    """Knows nothing of torchmetrics."""

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
    """Keeps what it sees in attributes of many kinds, and declares none of them."""

    count = 0
    total: Tensor

    def __init__(self, limit: float | None = None, words: Sequence[int] = ()) -> None:
        super().__init__()
        self.limit = limit
        self.words = Counter(words)
        self.kinds: set[float] = set()
        self.inner: dict[str, list[Any]] = {"means": [MeanMetric(), PlainMean()]}
        self.choose = len
        self.generator = random.Random(0)
        self.register_buffer("total", torch.zeros(2))

    @override
    def update(self, found: Tensor, wanted: Tensor) -> None:
        self.limit = float(found.max()) if self.limit is None else self.limit
        self.count += 1
        self.words.update(wanted.tolist())
        self.kinds.add(float(found.min()))
        self.inner["means"][0].update(found)
        self.inner["means"][1].update(found, wanted)
        self.total = self.total + self.generator.random()

    @override
    def compute(self) -> Any:
        inner = [float(mean.compute()) for mean in self.inner["means"]]
        return [self.limit, self.count, self.words[1], *sorted(self.kinds), *inner, *self.total.tolist()]

    @override
    def get_extra_state(self) -> Any:
        return self.generator.getstate()

    @override
    def set_extra_state(self, state: Any) -> None:
        self.generator.setstate(state)


class Module(nn.Module):
    """Is a module, and no metric of torchmetrics."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner, self._cache = MeanMetric(), 0  # torchmetrics calls something of its own by that name
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
    "tracked collection": lambda: MetricTracker(collection(prefix="x/"), maximize=[True] * 4),
    "composition": lambda: (BinaryAccuracy() + BinaryPrecision()) * torch.tensor(2.0),
    "not a number": lambda: MeanMetric(nan_strategy=float("nan")),
    "plain": PlainMean,
    "undeclared": Undeclared,
    "module": Module,
}


@pytest.mark.parametrize("how", ["uuuuu", "ufufu"])
@pytest.mark.parametrize("name", MORE)
def test_what_is_made_of_metrics_goes_on(name: str, how: str, tmp_path: Path) -> None:
    whole, late = check_goes_on(MORE[name], BY_NAME["Binary"], tmp_path, how)
    assert computed(late) != computed(whole) or name == "tracked collection"


# ---- what else a state is asked for


@pytest.mark.parametrize("name", ["aggregation.MeanMetric", "collections.MetricCollection", "wrappers.running.Running"])
def test_a_metric_that_saw_nothing_goes_on(name: str, tmp_path: Path) -> None:
    whole, resumed = make(name), make(name)
    load_metric_state(resumed, through(tmp_path, make(name)))
    assert bits(metric_state(resumed)) == bits(metric_state(whole))
    feed([whole, resumed], data_for(name), range(2), "uu")
    assert computed(resumed) == computed(whole)


class Drawn(SumMetric):
    @override
    def compute(self) -> Tensor:
        return rand(())


def test_a_value_that_was_computed_is_not_computed_again(tmp_path: Path) -> None:
    metric, resumed = Drawn(), Drawn()
    metric.update(1.0)
    value = metric.compute()
    load_metric_state(resumed, through(tmp_path, metric))
    assert torch.equal(resumed.compute(), value)
    resumed.update(1.0)
    assert not torch.equal(resumed.compute(), value)


class Described(SumMetric):
    @override
    def compute(self) -> Any:
        return {"value": self.sum_value, "by": object}


def test_a_computed_value_that_cannot_be_stored_is_computed_again(tmp_path: Path) -> None:
    metric, resumed = Described(), Described()
    metric.update(2.0)
    metric.compute()
    load_metric_state(resumed, through(tmp_path, metric))
    assert resumed.compute()["value"] == 2


def test_a_tracker_follows_to_fewer_steps(tmp_path: Path) -> None:
    short, long = make("wrappers.tracker.MetricTracker"), make("wrappers.tracker.MetricTracker")
    feed([short], BY_NAME["regression"], range(2), "uu")
    feed([long], BY_NAME["regression"], range(4), "uuuu")
    load_metric_state(long, through(tmp_path, short))
    assert (long.n_steps, bits(long.compute_all())) == (2, bits(short.compute_all()))


def test_a_synchronised_metric_keeps_what_is_its_own() -> None:
    metric, resumed = SumMetric(), SumMetric()
    metric.update(3.0)
    metric.sync(dist_sync_fn=lambda value, group: [value, value], distributed_available=lambda: True)
    assert metric.sum_value == 6
    load_metric_state(resumed, metric_state(metric))
    assert resumed.compute() == 3


def test_groups_are_groups_at_once(tmp_path: Path) -> None:
    saved, resumed = collection(), collection()
    feed([saved], BY_NAME["Binary"], range(1), "u")
    load_metric_state(resumed, through(tmp_path, saved))
    assert resumed.get_submodule("a").tp is resumed.get_submodule("b").tp
    feed([resumed], BY_NAME["Binary"], range(1), "u")
    assert resumed.compute_groups == {0: ["a", "b"], 1: ["c", "d"]}
    assert [metric.update_count for metric in resumed.values(copy_state=False)] == [2, 2, 2, 2]


def test_tensors_go_to_the_device_of_the_metric(tmp_path: Path) -> None:
    saved, here, on_host = CatMetric(), CatMetric().to("meta"), CatMetric(compute_on_cpu=True).to("meta")
    saved.update(torch.ones(2))
    saved.compute()
    for metric in (here, on_host):
        load_metric_state(metric, through(tmp_path / str(id(metric)), saved))
    assert vars(here)["_computed"].is_meta
    assert [metric.metric_state["value"][0].is_meta for metric in (here, on_host)] == [True, False]


# ---- what is refused


MISMATCHES: list[tuple[Callable[[], Any], Callable[[], Any], str]] = [
    (SumMetric, MeanMetric, "is a MeanMetric, and the state is that of a SumMetric"),
    (SumMetric, PlainMean, "is a PlainMean, and the state is that of a SumMetric"),
    (lambda: MetricCollection({"a": SumMetric()}), lambda: MetricCollection({"a": MeanMetric()}), "of a SumMetric"),
    (lambda: MetricCollection([SumMetric()]), lambda: MetricCollection([MeanMetric()]), r"\['SumMetric'\]"),
    (
        lambda: MulticlassAccuracy(3),
        lambda: MulticlassAccuracy(3, average="micro"),
        "='macro'.* average='micro'",
    ),
    (lambda: BinaryROC(thresholds=5), BinaryROC, "thresholds=Tensor.* thresholds=None"),
    (lambda: BinaryROC(thresholds=5), lambda: BinaryROC(thresholds=6), "thresholds="),
    (Undeclared, type("Undeclared", (SumMetric,), {}), r"Undeclared: the state has the (states|metrics)"),
    (lambda: MeanMetric(nan_strategy=float("nan")), MeanMetric, "nan_strategy=nan.* nan_strategy='warn'"),
]


@pytest.mark.parametrize(("saved", "made", "message"), MISMATCHES)
def test_the_state_of_another_metric_is_refused(saved: Any, made: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_metric_state(made(), through(tmp_path, saved()))


@pytest.mark.parametrize("values", [{"_modules": {}}, {"compute": 1}, {"x.y": 1}, {"__dict__": {}}, {3: 1}, []])
def test_a_state_that_no_metric_returned_is_refused(values: Any) -> None:
    state = metric_state(SumMetric()) | {"values": values}
    for metric, damaged in ((SumMetric(), state), (collection(), {"type": "MetricCollection"}), (PlainMean(), values)):
        with pytest.raises(CheckpointError, match=type(metric).__name__):
            load_metric_state(metric, damaged)


def test_an_object_without_a_state_is_refused() -> None:
    for call in (lambda: metric_state(object()), lambda: load_metric_state(object(), {"type": "object", "own": {}})):
        with pytest.raises(CheckpointError, match=r"A object has no state .* Give it state_dict\(self\)"):
            call()


@pytest.mark.parametrize(
    "value", [defaultdict(int), [object()], {1: {2: object()}}, random.Random(0), torch.Generator()]
)
def test_what_fills_and_cannot_be_stored_is_refused(value: object) -> None:
    metric = SumMetric()
    metric.kept = value
    with pytest.raises(CheckpointError, match=r"SumMetric.kept is a .* that cannot be stored.* get_extra_state"):
        metric_state(metric)


def test_what_a_metric_is_made_of_is_left_out() -> None:
    metric = SumMetric()
    metric.functions, metric.where, metric.tokenizer = [len, SumMetric], torch.device("cpu"), object()
    assert metric_state(metric)["values"].keys() == metric_state(SumMetric())["values"].keys()
