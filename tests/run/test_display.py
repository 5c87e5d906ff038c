"""Histories in notebooks: tables, and figures of matplotlib."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import IterableDataset
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from ptacc import CheckpointMixin, EpochRecord, EvalResult, MetricsMixin, RunHistory, Steps, Trainer
from ptacc.errors import OptionError
from ptacc.run.display import FIRST, LAST
from ptacc.testing import tiny_data, tiny_parts
from ptacc.types.outputs import ValuesRecord
from tests.display.test_tables import read_texts


class Measured(MetricsMixin, Trainer): ...


def train(*names: str, **options: Any) -> RunHistory:
    sets = {name: tiny_data(8) for name in names} if names else tiny_data(8)
    trainer = Measured(**tiny_parts(), metrics={"accuracy": MulticlassAccuracy(2)}, log_every=Steps(2))
    settings: Any = {"num_epochs": 2, **options}
    history: RunHistory = trainer.train(tiny_data(32), sets, **settings)
    return history


def labels_of(figure: Figure) -> dict[str, list[str]]:
    return {axis.get_ylabel(): [str(line.get_label()) for line in axis.lines] for axis in figure.axes}


def points(figure: Figure, panel: int, line: int) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in figure.axes[panel].lines[line].get_xydata().tolist()]  # type: ignore[union-attr]


# ---- tables


def test_a_history_is_a_table_of_its_epochs() -> None:
    texts = read_texts(train()._repr_html_())
    titles = ["epoch", "step", "train_loss", "learning_rate", "eval_loss", "accuracy", "seconds"]
    assert texts[:8] == ["2 epochs", *titles]
    assert texts[8:10] == ["1", "4"]
    assert len(texts) == 8 + 2 * len(titles)


def test_evaluations_within_epochs_have_a_table_of_their_own() -> None:
    texts = read_texts(train("first", "second", evaluate_every=Steps(2))._repr_html_())
    start = texts.index("8 evaluations") + 1
    assert texts[start : start + 5] == ["step", "epoch", "set", "loss", "accuracy"]
    assert [texts[start + 5 + row * 5 : start + 8 + row * 5] for row in range(3)] == [
        ["2", "1", "first"],
        ["2", "1", "second"],
        ["4", "1", "first"],
    ]


def test_long_tables_are_cut_and_the_reason_of_a_stop_is_escaped() -> None:
    history = RunHistory()
    history.stop_reason = "loss < 0.1"
    for epoch in range(1, 101):
        history.add_epoch(EpochRecord(epoch, epoch, 0.5, 8, 1.0, 0.1))
    html = history._repr_html_()
    assert html.count("<tr>") == 1 + FIRST + 1 + LAST
    assert "100 epochs, stopped: loss &lt; 0.1" in html


# ---- figures


def test_a_figure_has_a_panel_for_each_quantity_over_the_steps() -> None:
    history = train("first", "second", evaluate_every=Steps(3))
    figure = history.plot()
    assert labels_of(figure)["loss"] == ["training", "first", "second"]
    assert labels_of(figure)["accuracy"] == ["first", "second"]
    assert list(labels_of(figure)) == ["loss", "accuracy", "learning_rate"]
    assert [step for step, _ in points(figure, 0, 0)] == [2, 3, 4, 6, 8]
    assert points(figure, 0, 1) == [(e.step, e.loss) for e in history.evaluations if e.name == "first"]


class Resumable(CheckpointMixin, Trainer): ...


def test_the_figure_of_a_resumed_run_is_that_of_the_whole_run(tmp_path: Path) -> None:
    def train_to(steps: int) -> RunHistory:
        trainer = Resumable(**tiny_parts(), log_every=Steps(2), checkpoint_dir=tmp_path, resume=True)
        return trainer.train(tiny_data(), tiny_data(8), max_steps=steps, evaluate_every=Steps(4))

    train_to(5)
    figure = train_to(8).plot()
    assert [step for step, _ in points(figure, 0, 0)] == [2, 3, 4, 5, 6, 8]
    assert [step for step, _ in points(figure, 0, 1)] == [4, 5, 8]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    @override
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.cycle(zip(*tiny_data().tensors, strict=True))


def test_a_run_on_a_stream_is_drawn_and_listed() -> None:
    trainer = Trainer(**tiny_parts(), log_every=None)
    history = trainer.train(Stream(), tiny_data(8), max_steps=50, evaluate_every=Steps(10))
    assert [step for step, _ in points(history.plot(), 0, 1)] == [10, 20, 30, 40, 50]
    assert "5 evaluations" in read_texts(history._repr_html_())


def test_other_values_are_drawn_by_their_names() -> None:
    figure = train().plot("items_per_second", "loss")
    assert [axis.get_ylabel() for axis in figure.axes] == ["items_per_second", "loss"]
    with pytest.raises(OptionError, match=r"plot\('acuracy'\): .*Did you mean `accuracy`\? Reported were: loss"):
        train().plot("acuracy")


def test_a_figure_is_not_one_of_pyplots() -> None:
    import matplotlib.pyplot as plt

    figure = train(max_steps=1).plot()
    assert plt.get_fignums() == []
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


def test_values_that_are_not_finite_are_counted_in_the_legend() -> None:
    history = RunHistory()
    for step, loss in enumerate([0.5, float("nan"), float("inf")], start=1):
        history.add_values(ValuesRecord(step, 1, {"train_loss": loss, "body/learning_rate": 0.1, "learning_rate": 0.1}))
    figure = history.plot()
    assert labels_of(figure)["loss"] == ["training (2 not finite)"]
    figure._repr_png_()  # type: ignore[attr-defined]


def test_each_parameter_group_has_a_curve() -> None:
    history = RunHistory()
    rates = {"learning_rate": 0.1, "body/learning_rate": 0.1, "head/learning_rate": 0.2}
    history.add_values(ValuesRecord(1, 1, rates))
    history.add_evaluations(1, 1, {"training": EvalResult(0.5, {})})
    assert labels_of(history.plot()) == {"loss": ["training"], "learning_rate": ["body", "head"]}


def test_a_run_without_reports_cannot_be_drawn() -> None:
    with pytest.raises(OptionError, match=r"history.plot\(\): the run has reported nothing yet"):
        RunHistory().plot()
