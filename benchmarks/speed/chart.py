"""The chart of the documentation: the CPU time of each contender in each workload, relative to the plain loop."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.speed.contenders import CONTENDERS
from benchmarks.speed.measuring import Comparison, Results
from benchmarks.speed.workloads import WORKLOADS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 2


def draw(results: Results, folder: Path) -> None:
    """Write `chart.svg` and `chart.png`, with a panel per workload, and one for the workloads of ptacc alone."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels = dict(make_panels(results))
    if not panels:
        return
    mpl.rcParams["svg.hashsalt"] = "speed"  # makes the file reproducible
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.5 * columns, 0.4 + 2.9 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, title in itertools.zip_longest(axes, panels):
        if title is None:
            panel.remove()
        else:
            draw_panel(panel, title, panels[title])
    figure.savefig(folder / "chart.svg", metadata={"Date": None})
    figure.savefig(folder / "chart.png", dpi=100)


def make_panels(results: Results) -> Iterator[tuple[str, dict[str, Comparison]]]:
    """Yield the title of each panel and its bars."""
    alone: dict[str, Comparison] = {}
    for name, workload in WORKLOADS.items():
        bars = [each for each in results.comparisons.values() if each.workload == name]
        title = workload.title.replace("`", "")
        if [each.contender for each in bars] == ["ptacc"]:
            alone[title] = bars[0]
        elif bars:
            yield title, {CONTENDERS[each.contender].title: each for each in bars}
    if alone:
        yield "ptacc alone", alone


def draw_panel(axes: Axes, title: str, bars: Mapping[str, Comparison]) -> None:
    """Draw the median of each bar with its interval, the fastest at the top."""
    ratios = {label: bar.ratio("cpu") for label, bar in bars.items()}
    labels = sorted(ratios, key=lambda label: -ratios[label].median)
    medians = [ratios[label].median for label in labels]
    errors = [
        [ratios[label].median - ratios[label].low for label in labels],
        [ratios[label].high - ratios[label].median for label in labels],
    ]
    colors = ["tab:orange" if bars[label].contender == "ptacc" else "tab:blue" for label in labels]
    axes.barh([textwrap.fill(label, 34) for label in labels], medians, xerr=errors, color=colors, capsize=2)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_title(textwrap.fill(title, 60), fontsize="medium")
    axes.set_xlabel("CPU time, relative to plain PyTorch")
