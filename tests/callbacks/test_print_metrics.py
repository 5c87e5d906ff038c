import io
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from typing_extensions import override

from ptacc import PrintMetrics, StepResult, Steps, Trainer
from ptacc.callbacks import print_metrics
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import run_ranks
from tests.terminals import open_terminal


def make_parts(*callbacks: PrintMetrics) -> dict[str, Any]:
    return {**tiny_parts(), "log_every": Steps(1), "callbacks": callbacks}


def table(every: Any = None, **options: Any) -> list[str]:
    """Return what is printed by a run of 6 steps in 2 epochs, evaluated every 2 steps, with a report at each step."""
    out = io.StringIO()
    trainer = Trainer(**make_parts(PrintMetrics(every=every, file=out)))
    given: dict[str, Any] = {"num_epochs": 2, "evaluate_every": Steps(2)} | options
    trainer.train(tiny_data(), tiny_data(8), **given)
    return out.getvalue().splitlines()


def rows(lines: list[str]) -> list[list[str]]:
    """Return the epoch and the step of each row."""
    return [line.split()[:2] for line in lines if "epoch" not in line]


def test_a_row_for_each_epoch_has_the_means_over_the_epoch() -> None:
    header, *lines = table("epoch")
    assert header.split() == ["epoch", "step", "train_loss", "learning_rate", "eval_loss", "seconds"]
    assert rows(lines) == [["1", "3"], ["2", "6"]]
    assert len({len(line) for line in (header, *lines)}) == 1


def test_a_row_for_each_evaluation_comes_in_addition() -> None:
    assert rows(table("evaluation")) == [["1", "2"], ["1", "3"], ["2", "4"], ["2", "6"]]


def test_a_row_for_each_report_comes_in_addition() -> None:
    assert rows(table("report")) == [["1", "1"], ["1", "2"], ["1", "3"], ["2", "4"], ["2", "5"], ["2", "6"]]


def test_the_evaluation_before_the_first_step_has_a_row() -> None:
    assert rows(table("evaluation", evaluate_first=True))[0] == ["0", "0"]


def test_the_last_epoch_has_one_row_even_if_the_run_ends_within_it() -> None:
    assert rows(table("report", num_epochs=None, max_steps=2)) == [["1", "1"], ["1", "2"]]


def test_by_default_a_log_file_has_a_row_for_a_report_if_there_was_none_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert rows(table()) == rows(table("evaluation"))
    monkeypatch.setattr(print_metrics, "LOG_SECONDS", 0.0)
    assert rows(table()) == rows(table("report"))


def test_by_default_a_terminal_has_no_rows_for_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(print_metrics, "LOG_SECONDS", 0.0)
    with open_terminal(80) as terminal:
        Trainer(**make_parts(PrintMetrics(file=terminal.file))).train(tiny_data(), num_epochs=2)
    assert rows(terminal.screen[:-1]) == [["1", "3"], ["2", "6"]]


def test_the_header_is_printed_again_for_new_columns_and_after_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(print_metrics, "HEADER_EVERY", 3)
    lines = table("report")
    headers = {number: line.split()[-2] for number, line in enumerate(lines) if "epoch" in line}
    assert headers == {0: "items_per_second", 2: "eval_loss", 6: "eval_loss"}


class Measured(Trainer):
    """Reports many metrics."""

    @override
    def compute_metrics(self) -> dict[str, float]:
        return super().compute_metrics() | {"accuracy": 0.5, "precision": 0.25, "recall": 0.75}


def wrapped(columns: int, sets: Any) -> list[str]:
    with open_terminal(columns) as terminal:
        Measured(**make_parts(PrintMetrics(file=terminal.file))).train(tiny_data(), sets, num_epochs=1)
    assert max(map(len, terminal.screen)) <= columns
    return terminal.screen[:-1]


def test_a_table_that_is_too_wide_has_a_line_for_each_evaluation_set() -> None:
    header, row, *sets = wrapped(90, {"easy": tiny_data(8), "hard": tiny_data(8)})
    assert header.split() == ["epoch", "step", "train_loss", "learning_rate", "seconds"]
    assert len(row.split()) == 5
    easy, hard = (line.split() for line in sets)
    assert (easy[0][:10], easy[1:]) == ("easy/loss=", ["easy/accuracy=0.5", "easy/precision=0.25", "easy/recall=0.75"])
    assert hard[1] == "hard/accuracy=0.5"


def test_a_narrow_terminal_has_what_does_not_fit_on_further_lines() -> None:
    header, _, *others = wrapped(40, tiny_data(8))
    assert header.split() == ["epoch", "step", "train_loss", "seconds"]
    names = [pair.partition("=")[0] for line in others for pair in line.split()]
    assert names == ["learning_rate", "eval_loss", "accuracy", "precision", "recall"]


def test_a_log_file_has_a_table_of_any_width() -> None:
    out = io.StringIO()
    sets: Mapping[str, Any] = {f"set-{number}": tiny_data(8) for number in range(9)}
    Measured(**make_parts(PrintMetrics(file=out))).train(tiny_data(), sets, num_epochs=1)
    assert len(out.getvalue().splitlines()) == 2


def test_a_value_may_have_the_name_of_another_column() -> None:
    class Timed(Trainer):
        @override
        def on_step_end(self, step: StepResult) -> None:
            super().on_step_end(step)
            self.log({"step": 1.5, "seconds": 2.5})

    out = io.StringIO()
    Timed(**make_parts(PrintMetrics(file=out))).train(tiny_data(), num_epochs=1)
    assert out.getvalue().split()[-3:-1] == ["2.5", "1.5"]


def test_only_rank_0_prints() -> None:
    first, second = run_ranks(lambda: table("report"), 2)
    assert (len(first) > 1, second) == (True, [])


def test_the_learning_rates_of_parameter_groups_are_in_the_steps_of_the_history() -> None:
    out = io.StringIO()
    parts = make_parts(PrintMetrics(file=out, every="epoch"))
    weight, bias = parts["model"].parameters()
    groups: list[dict[str, Any]] = [{"params": [weight], "name": "weight"}, {"params": [bias], "lr": 0.5}]
    parts["optimizer"] = torch.optim.SGD(groups, lr=0.1)
    history = Trainer(**parts).train(tiny_data(), num_epochs=1)
    assert history.steps[0].logged == {"weight/learning_rate": 0.1, "1/learning_rate": 0.5}
    assert out.getvalue().split()[:5] == ["epoch", "step", "train_loss", "learning_rate", "seconds"]


def test_a_report_shows_the_learning_rates_of_groups_that_differ_from_the_first_one() -> None:
    out = io.StringIO()
    parts = make_parts(PrintMetrics(file=out, every="report"))
    weight, bias = parts["model"].parameters()
    groups: list[dict[str, Any]] = [{"params": [weight]}, {"params": [bias], "lr": 0.5}]
    parts["optimizer"] = torch.optim.SGD(groups, lr=0.1)
    Trainer(**parts).train(tiny_data(), num_epochs=1)
    header = out.getvalue().split()[:7]
    assert header[:5] == ["epoch", "step", "train_loss", "learning_rate", "1/learning_rate"]
    assert "0/learning_rate" not in out.getvalue()
