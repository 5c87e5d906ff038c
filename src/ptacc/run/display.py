"""A run's history as HTML tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ptacc.display.numbers import format_value
from ptacc.display.tables import Table, html_section
from ptacc.types.outputs import EpochRecord, EvaluationRecord

FIRST, LAST = 10, 20
"""How many rows of a long table are shown, at its beginning and at its end."""


def history_html(
    epochs: Sequence[EpochRecord], evaluations: Sequence[EvaluationRecord], stop_reason: str | None
) -> str:
    """Return a table of the epochs, and one of the evaluations if some were not at the end of an epoch."""
    title = f"{len(epochs)} epoch{'s' * (len(epochs) != 1)}" + (f", stopped: {stop_reason}" if stop_reason else "")
    rows = [{"epoch": e.epoch, "step": e.step, **e.values(), "seconds": round(e.seconds, 2)} for e in epochs]
    html = html_section(title, make_table(rows))
    if not {record.step for record in evaluations} <= {epoch.step for epoch in epochs}:
        title = f"{len(evaluations)} evaluation{'s' * (len(evaluations) != 1)}"
        html += html_section(title, make_table([evaluation_row(e) for e in evaluations]))
    return html


def evaluation_row(record: EvaluationRecord) -> dict[str, float | str]:
    """Return the values of an evaluation by their titles."""
    name = {"set": record.name} if record.name else {}
    return {"step": record.step, "epoch": record.epoch, **name, "loss": record.loss, **record.metrics}


def make_table(rows: Sequence[Mapping[str, float | str]]) -> Table:
    """Return a table of values by their titles, with "…" for rows and values that are left out."""
    titles = tuple(dict.fromkeys(title for row in rows for title in row))
    values = [[row.get(title, "") for title in titles] for row in rows]
    cells = [tuple(value if isinstance(value, str) else format_value(value) for value in row) for row in values]
    if len(cells) > FIRST + LAST:
        cells[FIRST:-LAST] = [("…",) * len(titles)]
    return Table(tuple(cells), titles, frozenset(titles) - {"set"})
