"""The page of one run or several: charts, tables of values and options, and how each run ended."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from itertools import chain, takewhile
from pathlib import Path
from xml.etree.ElementTree import Element

from ptacc.display.numbers import format_value
from ptacc.report.charts import Curve, Marks, draw_chart, is_drawable
from ptacc.report.markup import element, to_html
from ptacc.report.run_files import RecordedRun
from ptacc.report.text import (
    UNKNOWN,
    format_best,
    format_duration,
    format_steps,
    format_time,
    format_values,
)

TITLES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "items_per_second": "Items per second",
}
MAY_BE_LOG = ("loss", "grad_norm")
"""Charts with a logarithmic axis if their values differ by orders of magnitude."""
COLORS, DASHES = 6, 4
NEUTRAL = COLORS
"""The color of a dash pattern in a legend."""
STEP_LOSS = "loss of each step"
PATHS = ("history_file", "checkpoint_dir")
"""Options that differ in all runs."""


def make_page(runs: Sequence[RecordedRun]) -> str:
    """Return the HTML page of runs. It needs no other file, no network and no script."""
    labels = make_labels(runs)
    title = f"Run {runs[0].title}" if len(runs) == 1 else f"{len(runs)} runs"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{title} - ptacc"),
        element("style", files("ptacc.report").joinpath("style.css").read_text(encoding="utf-8")),
    )
    is_single = len(runs) == 1
    body = element(
        "body",
        element("h1", title),
        *([summary_table(runs[0])] if is_single else section("Runs", overview_table(runs, labels))),
        *section("Curves", chart_grid(runs, labels), marks_note(runs)),
        *section("Values", values_table(runs, labels)),
        *([] if is_single else differing_settings(runs, labels)),
        *chain.from_iterable(run_details(run, label) for run, label in zip(runs, labels, strict=True)),
    )
    return "<!DOCTYPE html>\n" + to_html(element("html", head, body, lang="en")) + "\n"


def section(title: str, *parts: Element) -> list[Element]:
    """Return a heading with what follows it."""
    return [element("h2", title), *parts]


def make_labels(runs: Sequence[RecordedRun]) -> list[str]:
    """Return a short name for each run: its title without the directory that all have in common."""
    titles = [run.title for run in runs]
    parts = [Path(title).parts for title in titles]
    columns = zip(*parts, strict=False)
    common = sum(1 for _ in takewhile(lambda column: len({*column}) == 1, columns)) if len({*parts}) > 1 else 0
    return [str(Path(*own[common:])) if own[common:] else title for own, title in zip(parts, titles, strict=True)]


def table(head: Sequence[str], rows: Iterable[Sequence[str | Element]], *, class_: str = "") -> Element:
    """Return a table. The first cell of each row is its heading."""
    body = element("tbody")
    for first, *others in rows:
        cells = (element("td", cell, data_label=name) for name, cell in zip(head[1:], others, strict=True))
        body.append(element("tr", element("th", first, scope="row"), *cells))
    titles = element("tr", *(element("th", name, scope="col") for name in head))
    return element("table", element("thead", titles), body, class_=class_)


# ---- how the runs went


def overview_table(runs: Sequence[RecordedRun], labels: Sequence[str]) -> Element:
    """Return a table with one row for each run."""
    rows: list[Sequence[str | Element]] = []
    for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
        name = element("span", swatch(number % COLORS, 0), label)
        times = format_time(run.started), format_duration(run.seconds), str(max(len(run.attempts) - 1, 0))
        rows.append([name, run.status, format_steps(run), format_best(run), *times])
    return table(["run", "status", "step", "best", "started", "duration", "resumed"], rows, class_="cards")


def summary_table(run: RecordedRun) -> Element:
    """Return a table of what one run did."""
    rows = [("status", run.status), ("step", format_steps(run)), ("epoch", str(run.epoch)), ("best", format_best(run))]
    if run.attempts:
        ended, resumed = run.attempts[-1].ended, [f"{attempt.first_step:,}" for attempt in run.attempts[1:]]
        times = "once, from step" if len(resumed) == 1 else f"{len(resumed)} times, from steps"
        rows += [
            ("started", format_time(run.started)),
            ("ended", format_time(ended) if ended else f"last line written {format_time(run.written)}"),
            ("duration", format_duration(run.seconds)),
            ("resumed", f"{times} {', '.join(resumed)}" if resumed else "never"),
        ]
    rows += [("not read", problem) for problem in run.problems]
    return table(["", ""], rows, class_="pairs")


def run_details(run: RecordedRun, label: str) -> Iterator[Element]:
    """Yield the tables of one run: trainer and environment, attempts, options, checkpoints."""
    rows = [("files", str(run.path)), *(("not read", problem) for problem in run.problems)]
    if run.attempts:
        first, last = run.attempts[0], run.attempts[-1]
        rows = [*{**first.trainer, **last.trainer}.items(), *last.environment.items(), *rows]
    yield from section(f"Details: {label}", table(["", ""], rows, class_="pairs"))
    if run.attempts:
        options = [(name, text, origin) for name, (text, origin) in run.attempts[-1].settings().items()]
        yield details("Options", ["option", "value", "origin"], options)
        attempts = [[format_time(a.started), f"{a.first_step:,}", format_time(a.ended), a.status] for a in run.attempts]
        yield details("Attempts", ["started", "from step", "ended", "outcome"], attempts)
    checkpoints = [
        [entry.title, f"{manifest.step:,}", manifest.label or UNKNOWN, format_values(manifest.metrics.items())]
        for entry in run.checkpoints
        if (manifest := entry.manifest) is not None
    ]
    if checkpoints:
        yield details("Checkpoints", ["checkpoint", "step", "label", "values"], checkpoints)


def details(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Element:
    """Return a table that readers unfold."""
    return element("details", element("summary", f"{title} ({len(rows)})"), table(head, rows, class_="cards"))


def differing_settings(runs: Sequence[RecordedRun], labels: Sequence[str]) -> list[Element]:
    """Return a table of the options and arguments that are not the same in all runs."""
    given = [run.attempts[-1].settings() if run.attempts else {} for run in runs]
    names = dict.fromkeys(name for settings in given for name in settings if name not in PATHS)
    values = {name: [settings[name][0] if name in settings else UNKNOWN for settings in given] for name in names}
    rows = [
        (name, label, value)
        for name, texts in values.items()
        if len(set(texts)) > 1
        for label, value in zip(labels, texts, strict=True)
    ]
    return section("Options that differ", table(["option", "run", "value"], rows, class_="cards")) if rows else []


# ---- curves and values


def chart_grid(runs: Sequence[RecordedRun], labels: Sequence[str]) -> Element:
    """Return a chart for each kind of value."""
    figures: list[Element] = []
    for kind, names in group_names(runs).items():
        if curves := list(make_curves(kind, names, runs, labels)):
            figures.append(make_figure(f"chart{len(figures)}", kind, curves, runs, labels))
    return element("div", *figures, class_="charts")


def group_names(runs: Sequence[RecordedRun]) -> dict[str, list[str]]:
    """Return the names of all values by chart: losses first, then what was evaluated; values of training first."""
    names = list(dict.fromkeys(chain.from_iterable([*run.evaluated, *run.values] for run in runs)))
    charts: dict[str, list[str]] = {"loss": []}
    for name in names:
        charts.setdefault(chart_of(name), []).append(name)
    return {kind: sorted(group, key=lambda name: not name.startswith("train")) for kind, group in charts.items()}


def chart_of(name: str) -> str:
    """Return which chart a value is in: those of several sets or groups share one.

    Example:
        >>> chart_of("train_loss"), chart_of("test/accuracy"), chart_of("head/learning_rate")
        ('loss', 'accuracy', 'learning_rate')
    """
    kind = name.rpartition("/")[2]
    return "loss" if kind in ("train_loss", "eval_loss") else kind


def make_curves(kind: str, names: Sequence[str], runs: Sequence[RecordedRun], labels: Sequence[str]) -> Iterator[Curve]:
    """Yield the curves of a chart. Colors stand for runs, or for values if there is one run; dashes for values."""
    is_single = len(runs) == 1
    for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
        if kind == "loss" and run.step_losses and (is_single or "train_loss" not in run.values):
            yield Curve("" if is_single else label, STEP_LOSS, run.step_losses, number % COLORS, 0, is_faint=True)
        for place, name in enumerate(names):
            if name in run.values:
                of_run, of_name = "" if is_single else label, name if is_single or len(names) > 1 else ""
                color, dash = (place if is_single else number) % COLORS, (place + number // COLORS) % DASHES
                yield Curve(of_run, of_name, run.values[name], color, dash, is_evaluated=name in run.evaluated)


def make_figure(
    name: str, kind: str, curves: Sequence[Curve], runs: Sequence[RecordedRun], labels: Sequence[str]
) -> Element:
    """Return a chart with its title, its legend, and a note about values that are not drawn."""
    marks = [
        Marks(
            number % COLORS,
            [entry.manifest.step for entry in run.checkpoints if entry.manifest is not None],
            [attempt.first_step for attempt in run.attempts[1:]],
        )
        for number, run in enumerate(runs)
    ]
    title, last_step = TITLES.get(kind, kind), max(run.step for run in runs)
    chart = draw_chart(title, curves, marks, last_step, name, may_be_log=kind in MAY_BE_LOG)
    figure = element("figure", element("figcaption", title), chart, make_legend(curves, runs, labels))
    if gaps := [text for curve in curves if (text := describe_gaps(curve))]:
        figure.append(element("p", f"Gaps are values that are NaN or infinite: {'; '.join(gaps)}.", class_="note"))
    return figure


def describe_gaps(curve: Curve) -> str:
    """Return how many values of a curve are not drawn; empty if all are."""
    missing = [step for step, value in curve.values.items() if not is_drawable(value)]
    counts = f"{len(missing):,} of {len(curve.values):,}"
    return f"{curve.label} {counts}, the first at step {min(missing):,}" if missing else ""


def make_legend(curves: Sequence[Curve], runs: Sequence[RecordedRun], labels: Sequence[str]) -> Element:
    """Return what colors and dashes stand for: each curve, or runs and values apart where both are several."""
    names = {curve.dash: curve.name for curve in curves}
    entries = [(swatch(curve.color, curve.dash, is_faint=curve.is_faint), curve.label) for curve in curves]
    if 1 < len(runs) <= COLORS and len(names) > 1:
        entries = [(swatch(number, 0), label) for number, label in enumerate(labels)]
        entries += [(swatch(NEUTRAL, dash), name) for dash, name in names.items()]
    return element("ul", *(element("li", line, text) for line, text in entries), class_="legend")


def swatch(color: int, dash: int, *, is_faint: bool = False) -> Element:
    """Return a piece of a line, for a legend."""
    line = element("path", d="M1 5H23", class_=f"curve c{color} d{dash}{' faint' if is_faint else ''}")
    return element("svg", line, viewBox="0 0 24 10", class_="swatch", aria_hidden="true")


def marks_note(runs: Sequence[RecordedRun]) -> Element:
    """Return what the marks in the charts mean."""
    parts = ["A dot is an evaluation."]
    if any(run.checkpoints for run in runs):
        parts.append("A triangle on the axis is a checkpoint that still exists.")
    if any(len(run.attempts) > 1 for run in runs):
        parts.append("A vertical line is a resumption.")
    return element("p", " ".join(parts), class_="note")


def values_table(runs: Sequence[RecordedRun], labels: Sequence[str]) -> Element:
    """Return a table of the last, the lowest and the highest value of each name."""
    rows: list[Sequence[str | Element]] = []
    for name in chain.from_iterable(group_names(runs).values()):
        for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
            if name not in run.values:
                continue
            points = sorted(run.values[name].items())
            finite = [point for point in points if math.isfinite(point[1])]
            extremes = [choose(finite, key=lambda point: point[1], default=points[-1]) for choose in (min, max)]
            cells = [f"{format_value(value)} @ {step:,}" for step, value in (points[-1], *extremes)]
            run_cell = [element("span", swatch(number % COLORS, 0), label)] if len(runs) > 1 else []
            rows.append([name, *run_cell, *cells])
    titles = ["value", *(["run"] if len(runs) > 1 else []), "last @ step", "lowest", "highest"]
    return table(titles, rows, class_="cards")
