"""The chart of the docs: what everybody's step costs, as a ratio to the plain loop's."""

from __future__ import annotations

from pathlib import Path

from benchmarks.speed.contenders import CONTENDERS
from benchmarks.speed.measuring import Results
from benchmarks.speed.workloads import WORKLOADS

SHOWN = ("step", "convnet", "gpt", "evaluate")


def draw(results: Results, folder: Path) -> None:
    """Draw `chart.svg` and `chart.png`: bars of the workloads that peers took on, or else ptacc's, with intervals."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    found = [name for name in SHOWN if any(workload == name for workload, _ in results.comparisons)]
    panels = [name for name in found if has_peers(results, name)] or found
    if not panels:
        return
    mpl.rcParams["svg.hashsalt"] = "speed"  # or two drawings of the same would differ
    figure = Figure(figsize=(10, 0.6 + 2.9 * len(panels)), layout="constrained")
    for axes, workload in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        bars = [each for each in results.comparisons.values() if each.workload == workload]
        ratios = {CONTENDERS[each.contender].title: each.ratio("cpu") for each in bars}
        names = sorted(ratios, key=lambda name: -ratios[name].median)
        medians = [ratios[name].median for name in names]
        spread = [[ratios[n].median - ratios[n].low for n in names], [ratios[n].high - ratios[n].median for n in names]]
        colours = ["tab:orange" if name == CONTENDERS["ptacc"].title else "tab:blue" for name in names]
        axes.barh(names, medians, xerr=spread, color=colours, capsize=2)
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set(title=WORKLOADS[workload].title.replace("`", ""), xlabel="CPU time, times plain PyTorch")
    figure.savefig(folder / "chart.svg", metadata={"Date": None})
    figure.savefig(folder / "chart.png", dpi=100)


def has_peers(results: Results, name: str) -> bool:
    """Say whether anyone but ptacc took on a workload."""
    return any(workload == name and contender != "ptacc" for workload, contender in results.comparisons)
