"""The chart of the documentation: the time per step of each contender, relative to the plain loop."""

from __future__ import annotations

from pathlib import Path

from benchmarks.speed.contenders import CONTENDERS
from benchmarks.speed.measuring import Results
from benchmarks.speed.workloads import WORKLOADS

SHOWN = ("step", "convnet", "gpt", "evaluate")


def draw(results: Results, folder: Path) -> None:
    """Write `chart.svg` and `chart.png`, with one panel per workload.

    The chart has the workloads with several contenders. If there are none, it has the workloads of ptacc.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = [name for name in SHOWN if any(workload == name for workload, _ in results.comparisons)]
    panels = [name for name in names if has_other_contenders(results, name)] or names
    if not panels:
        return
    mpl.rcParams["svg.hashsalt"] = "speed"  # makes the file reproducible
    figure = Figure(figsize=(10, 0.6 + 2.9 * len(panels)), layout="constrained")
    for axes, workload in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        bars = [each for each in results.comparisons.values() if each.workload == workload]
        ratios = {CONTENDERS[each.contender].title: each.ratio("cpu") for each in bars}
        titles = sorted(ratios, key=lambda title: -ratios[title].median)
        medians = [ratios[title].median for title in titles]
        errors = [
            [ratios[title].median - ratios[title].low for title in titles],
            [ratios[title].high - ratios[title].median for title in titles],
        ]
        colors = ["tab:orange" if title == CONTENDERS["ptacc"].title else "tab:blue" for title in titles]
        axes.barh(titles, medians, xerr=errors, color=colors, capsize=2)
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set(title=WORKLOADS[workload].title.replace("`", ""), xlabel="CPU time, relative to plain PyTorch")
    figure.savefig(folder / "chart.svg", metadata={"Date": None})
    figure.savefig(folder / "chart.png", dpi=100)


def has_other_contenders(results: Results, name: str) -> bool:
    """Return whether a workload has a contender other than ptacc."""
    return any(workload == name and contender != "ptacc" for workload, contender in results.comparisons)
