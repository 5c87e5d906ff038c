"""Draw the plot of docs/guides/schedules.md: `python docs/draw_schedules.py`."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from torch import nn
from torch.optim import SGD

from ptacc import RunPlan
from ptacc.schedules import FactorSchedule, inverse_sqrt, warmup_cosine, warmup_linear, warmup_stable_decay

STEPS = 100
SCHEDULES: dict[str, tuple[FactorSchedule, str | tuple[int, tuple[int, int]]]] = {
    "warmup_cosine(0.1)": (warmup_cosine(0.1), "-"),
    "warmup_linear(0.1)": (warmup_linear(0.1), "--"),
    "warmup_stable_decay(0.1, decay=0.3)": (warmup_stable_decay(0.1, decay=0.3), "-."),
    'warmup_stable_decay(0.1, decay=0.3, shape="sqrt")': (warmup_stable_decay(0.1, decay=0.3, shape="sqrt"), ":"),
    "inverse_sqrt(0.1)": (inverse_sqrt(0.1), (0, (5, 1))),
}


def compute_rates(schedule: FactorSchedule) -> list[float]:
    """Return the learning rate of each step of a run, for an optimizer with the rate 1."""
    optimizer = SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    scheduler = schedule(optimizer, RunPlan.compute(None, None, STEPS))
    rates = []
    for _ in range(STEPS):
        rates += scheduler.get_last_lr()
        scheduler.step()
    return rates


def main() -> None:
    """Draw the schedules over one run."""
    mpl.rcParams |= {"svg.hashsalt": "schedules", "svg.fonttype": "none"}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, (schedule, style) in SCHEDULES.items():
        axes.plot(range(1, STEPS + 1), compute_rates(schedule), linestyle=style, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("factor of the learning rate")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(Path(__file__).parent / "guides" / "schedules.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
