"""Figures of a run: one panel for each quantity, over the optimizer steps. Needs matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ptacc.errors import OptionError
from ptacc.types.outputs import EvalResult, EvaluationRecord, ValuesRecord
from ptacc.validation import did_you_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curves: TypeAlias = dict[tuple[str, bool], list[tuple[int, float]]]
"""Points (step, value) by the label of a curve, and whether evaluations measured it."""
LOSS, RATE = "loss", "learning_rate"
FEW_POINTS = 30
"""Up to this number, the points of a curve are marked."""
WIDTH, HEIGHT = 8.0, 2.2
"""Inches: of the figure, and of each panel."""


class RunFigure(Figure):
    """A figure that a notebook shows, also if pyplot was not imported."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def draw_run(
    values: Sequence[ValuesRecord], evaluations: Sequence[EvaluationRecord], names: Sequence[str]
) -> RunFigure:
    """Draw a panel for each quantity of these names; by default for the loss, the metrics and the learning rate.

    Raises:
        OptionError: A quantity was not reported, or nothing was.
    """
    panels = collect_panels(values, evaluations)
    for name in names:
        if name not in panels:
            raise OptionError(
                f"history.plot({name!r}): the run has not reported it. {did_you_mean(name, panels)}Reported were: "
                f"{', '.join(panels)}."
            )
    shown = names or [name for name, curves in panels.items() if name == RATE or any(label for label, _ in curves)]
    if not shown:
        raise OptionError("history.plot(): the run has reported nothing yet. Call it after the first report.")
    figure = RunFigure(figsize=(WIDTH, HEIGHT * len(shown) + 0.4), layout="constrained")
    axes: list[Axes] = list(figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0])
    curves = list(dict.fromkeys(curve for name in shown for curve in panels[name]))
    for axis, name in zip(axes, shown, strict=True):
        for (label, is_evaluated), points in panels[name].items():
            draw_curve(axis, label, points, color=f"C{curves.index((label, is_evaluated))}", is_marked=is_evaluated)
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
        if name == RATE:
            axis.set_ylim(bottom=0)  # so that a constant rate is not magnified
        if axis.get_legend_handles_labels()[1]:
            axis.legend()
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    return figure


def draw_curve(axis: Axes, label: str, points: Sequence[tuple[int, float]], *, color: str, is_marked: bool) -> None:
    """Draw a curve. Values that are NaN or infinite are left out, and counted in the legend."""
    finite = [value if math.isfinite(value) else math.nan for _, value in points]
    missing = sum(map(math.isnan, finite))
    text = f"{label} ({missing} not finite)".lstrip() if missing else label
    marker, width = ("o", 1.5) if is_marked else ("." if len(points) <= FEW_POINTS else "", 1.0)
    steps = [step for step, _ in points]
    axis.plot(steps, finite, label=text or None, color=color, marker=marker, markersize=5, linewidth=width)


def collect_panels(values: Sequence[ValuesRecord], evaluations: Sequence[EvaluationRecord]) -> dict[str, Curves]:
    """Return the curves of each quantity: first the loss, then metrics and other values, and the learning rate last.

    Example:
        >>> reports = [
        ...     ValuesRecord(step=4, epoch=1, values={"train_loss": 0.5, "eval_loss": 0.6, "learning_rate": 0.1})
        ... ]
        >>> collect_panels(reports, [EvaluationRecord(step=4, epoch=1, name="", loss=0.6, metrics={})])["loss"]
        {('training', False): [(4, 0.5)], ('evaluation', True): [(4, 0.6)]}
    """
    panels: dict[str, Curves] = {LOSS: {}}
    evaluated = {"epoch"}
    for record in evaluations:
        evaluated |= EvalResult(record.loss, record.metrics).values(record.name).keys()
    for report in values:
        for name, value in report.values.items():
            if name not in evaluated:
                panel, label = locate(name)
                panels.setdefault(panel, {}).setdefault((label, False), []).append((report.step, value))
    for record in evaluations:
        curve = record.name or "evaluation", True
        for name, value in {LOSS: record.loss, **record.metrics}.items():
            panels.setdefault(name, {}).setdefault(curve, []).append((record.step, value))
    rates = panels.pop(RATE, {})
    if len(rates) > 1:
        del rates["", False]  # that of the first group
    return {name: curves for name, curves in [*panels.items(), (RATE, rates)] if curves}


def locate(name: str) -> tuple[str, str]:
    """Return the quantity and the label of a value that is not of an evaluation.

    Example:
        >>> locate("train_loss"), locate("train/accuracy"), locate("head/learning_rate"), locate("grad_norm")
        (('loss', 'training'), ('accuracy', 'training'), ('learning_rate', 'head'), ('grad_norm', ''))
    """
    if name == "train_loss":
        return LOSS, "training"
    before, _, last = name.rpartition("/")
    if last == RATE:
        return RATE, before
    return (last, "training") if before == "train" else (name, "")
