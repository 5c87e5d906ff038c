"""Line charts as SVG elements. They are readable on a phone, in light and dark, and without a script.

Their size in the page follows its width. Colors and dashes are classes, which the style sheet defines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TypeAlias
from xml.etree.ElementTree import Element

from ptacc.report.markup import element

Point: TypeAlias = tuple[int, float]

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 50, 340, 10, 192
MARK = 6
"""Height of the mark of a checkpoint, which is below all curves."""
BUCKET = 1.5
"""Width of the interval in which a curve shows only its lowest and its highest point; in a chart of `WIDTH`."""
MAX_DOTS, MAX_LARGE_DOTS = 100, 30
"""Up to so many evaluations have a dot each, or a large one."""
LOG_RATIO = 100
"""Positive values that differ by this factor or more have a logarithmic axis."""


@dataclass(frozen=True)
class Curve:
    """The values of one name in one run.

    Args:
        run: Label of the run; empty if all curves of the chart are of one run.
        name: Name of the values; empty if all curves of the chart have one name.
        values: By step.
        color: Number of the color.
        dash: Number of the dash pattern.
        is_evaluated: Whether each value is an evaluation, which gets a dot.
        is_faint: Whether the curve is the background of another one.
    """

    run: str
    name: str
    values: Mapping[int, float]
    color: int
    dash: int
    is_evaluated: bool = False
    is_faint: bool = False

    @property
    def label(self) -> str:
        """What distinguishes the curve from the others in the chart."""
        return ": ".join(filter(None, (self.run, self.name)))

    @property
    def style(self) -> str:
        """The classes of the curve."""
        return f"curve c{self.color} d{self.dash}{' faint' if self.is_faint else ''}"


@dataclass(frozen=True)
class Marks:
    """Steps of a run that all charts mark."""

    color: int
    checkpoints: Sequence[int] = ()
    resumptions: Sequence[int] = ()


@dataclass(frozen=True)
class Axis:
    """A range of values, and where it is in the chart."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]
    is_log: bool = False

    @classmethod
    def fit(cls, values: Sequence[float], start: float, end: float, *, may_be_log: bool = False) -> Axis:
        """Return the axis for some values, which are drawable."""
        low, high = min(values, default=0.0), max(values, default=0.0)
        if may_be_log and low > 0 and high / LOG_RATIO >= low:
            low, high = math.log10(low), math.log10(high)
            decades = range(math.ceil(low), math.floor(high) + 1)
            return cls(low, high, start, end, [10.0**d for d in decades[:: len(decades) // 6 + 1]], is_log=True)
        if 0 < low < high / 5:
            low = 0.0
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # also of zeros
            margin = abs(low) / 10 or 1.0
            low, high = low - margin, high + margin
        return cls(low, high, start, end, find_ticks(low, high))

    def place(self, value: float) -> float:
        """Return where a value is in the chart."""
        value = math.log10(value) if self.is_log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def find_ticks(low: float, high: float) -> list[float]:
    """Return at most six round values within a range.

    Example:
        >>> find_ticks(0.13, 0.92)
        [0.2, 0.4, 0.6, 0.8]
    """
    coarse = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(coarse))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= coarse)
    return [float(f"{n * step:.12g}") for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def is_drawable(value: float) -> bool:
    """Return whether a value has a place in a chart: it is finite, and differences of two such values are."""
    return abs(value) < 1e300


def draw_chart(
    title: str, curves: Sequence[Curve], marks: Sequence[Marks], last_step: int, name: str, *, may_be_log: bool = False
) -> Element:
    """Return a chart. `name` is unique in the page. `title` and a description are for those who cannot see it."""
    drawable = [value for curve in curves for value in curve.values.values() if is_drawable(value)]
    across = Axis.fit([0, max(last_step, 1)], LEFT, RIGHT)
    upward = Axis.fit(drawable, BOTTOM - MARK, TOP, may_be_log=may_be_log)
    scale = " The vertical axis is logarithmic." if upward.is_log else ""
    return element(
        "svg",
        element("title", title, id=f"{name}-title"),
        element("desc", " ".join(map(describe, curves)) + scale, id=f"{name}-desc"),
        *draw_axes(across, upward),
        *(part for mark in marks for part in draw_marks(mark, across)),
        *(part for curve in curves for part in draw_curve(curve, across, upward)),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
    )


def describe(curve: Curve) -> str:
    """Return a sentence about the values of a curve."""
    finite = [value for value in curve.values.values() if math.isfinite(value)]
    extent = f", from {min(finite):.4g} to {max(finite):.4g}" if finite else ""
    last = max(curve.values)
    return f"{curve.label}: {len(curve.values)} values{extent}; the last is {curve.values[last]:.4g} at step {last:,}."


def draw_axes(across: Axis, upward: Axis) -> list[Element]:
    """Return grid lines with their values, and the name of the horizontal axis."""
    parts = [element("path", d=f"M{LEFT} {upward.place(tick):.1f}H{RIGHT}", class_="grid") for tick in upward.ticks]
    for tick in upward.ticks:
        y = f"{upward.place(tick) + 4:.1f}"
        parts.append(element("text", shorten(tick), x=LEFT - 6, y=y, class_="tick", text_anchor="end"))
    for tick in filter(float.is_integer, across.ticks):
        x = f"{across.place(tick):.1f}"
        parts.append(element("text", shorten(tick), x=x, y=BOTTOM + 15, class_="tick", text_anchor="middle"))
    parts.append(element("path", d=f"M{LEFT} {BOTTOM}H{RIGHT}", class_="axis"))
    parts.append(element("text", "step", x=RIGHT, y=HEIGHT - 2, class_="tick", text_anchor="end"))
    return parts


def shorten(value: float) -> str:
    """Return a value as a label of an axis.

    Example:
        >>> shorten(0.25), shorten(2000), shorten(20_000), shorten(1_500_000)
        ('0.25', '2000', '20k', '1.5M')
    """
    if 1e6 <= abs(value) < 1e9:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if 1e4 <= abs(value) < 1e6 else f"{value:.5g}"


def draw_marks(marks: Marks, across: Axis) -> list[Element]:
    """Return triangles for checkpoints, and vertical lines for resumptions."""
    places = sorted({round(across.place(step)) for step in marks.checkpoints})
    triangles = "".join(f"M{x} {BOTTOM - MARK}l3.5 {MARK}h-7z" for x in places)
    lines = "".join(f"M{across.place(step):.1f} {TOP}V{BOTTOM}" for step in marks.resumptions)
    parts = {"checkpoint": triangles, "resumption": lines}
    return [element("path", d=path, class_=f"{kind} c{marks.color}") for kind, path in parts.items() if path]


def draw_curve(curve: Curve, across: Axis, upward: Axis) -> list[Element]:
    """Return the lines of a curve, interrupted where a value is not finite, and the dots of evaluations."""
    path = ""
    for piece in thin(curve.values, across):
        places = [f"{across.place(step):.1f} {upward.place(value):.1f}" for step, value in piece]
        path += f"M{' '.join(places)}" + ("h0" if len(places) == 1 else "")  # a line of no length is drawn as a dot
    parts = [element("path", d=path, class_=curve.style)]
    if not curve.is_evaluated or len(curve.values) > MAX_DOTS:
        return parts
    radius = 2.5 if len(curve.values) <= MAX_LARGE_DOTS else 1.2
    for step, value in curve.values.items():
        if is_drawable(value):
            tip = element("title", f"{curve.label}: {value:.6g} at step {step:,}")
            x, y = f"{across.place(step):.1f}", f"{upward.place(value):.1f}"
            parts.append(element("circle", tip, cx=x, cy=y, r=radius, class_=f"dot c{curve.color}"))
    return parts


def thin(values: Mapping[int, float], across: Axis) -> list[list[Point]]:
    """Return the drawable points of a curve that can be seen: of each small interval the lowest and the highest.

    Returns:
        The pieces of the curve, in order. Between two of them there are values that are not finite.
    """
    pieces: list[list[Point]] = [[]]
    for _, group in groupby(sorted(values.items()), key=lambda point: across.place(point[0]) // BUCKET):
        points = list(group)
        drawable = [point for point in points if is_drawable(point[1])]
        if drawable:
            pieces[-1] += sorted({min(drawable, key=itemgetter(1)), max(drawable, key=itemgetter(1))})
        if len(drawable) < len(points):
            pieces.append([])
    return [piece for piece in pieces if piece]
