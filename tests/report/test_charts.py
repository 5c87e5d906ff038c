"""Charts draw what can be seen of a curve, with gaps where it is not finite."""

import math
import re
from collections.abc import Mapping
from xml.etree.ElementTree import Element

import pytest

from ptacc.report.charts import BOTTOM, LEFT, RIGHT, TOP, Axis, Curve, Marks, draw_chart, find_ticks, thin

NUMBER = re.compile(r"-?[\d.]+")


def draw(values: Mapping[int, float], **options: bool) -> Element:
    curve = Curve("", "loss", values, 0, 0, is_evaluated=True)
    return draw_chart("Loss", [curve], [Marks(0)], max(values), "x", **options)


def path_of(svg: Element) -> str:
    (path,) = [part.get("d", "") for part in svg.iter("path") if "curve" in part.get("class", "")]
    return path


def labels(svg: Element) -> list[str]:
    return ["".join(part.itertext()) for part in svg.iter("text")]


def test_a_long_curve_is_thinned_and_keeps_its_extremes() -> None:
    values = {step: math.sin(step / 1000) for step in range(100_000)}
    values[54_321], values[54_322] = 7.0, -7.0
    (piece,) = thin(values, Axis.fit([0, 100_000], LEFT, RIGHT))
    assert len(piece) < 500
    assert {(54_321, 7.0), (54_322, -7.0)} <= set(piece)
    assert piece == sorted(piece)


def test_a_short_curve_is_drawn_in_full() -> None:
    (piece,) = thin({step: step % 3 for step in range(100)}, Axis.fit([0, 100], LEFT, RIGHT))
    assert len(piece) == 100


@pytest.mark.parametrize("hole", [math.nan, math.inf, -math.inf, 1e305])
def test_values_that_are_not_finite_are_gaps(hole: float) -> None:
    assert path_of(draw({1: 1.0, 2: 2.0, 3: hole, 4: 2.0, 5: 1.0})).count("M") == 2


def test_a_value_between_two_gaps_is_a_dot() -> None:
    assert path_of(draw({1: math.nan, 2: 2.0, 3: math.nan})).endswith("h0")


@pytest.mark.parametrize(
    "values",
    [
        {0: 0.5},
        {1: 3.0, 2: 3.0},
        {1: 0.0, 2: 0.0},
        {1: math.nan},
        {1: -1e299, 2: 1e299},
        {1: 1e-320, 2: 2e-320},
        {1: 1.0, 2: 1.0 + 1e-15},
        {2**53: 1.0, 1: 2.0},
    ],
)
def test_every_place_is_within_the_chart(values: dict[int, float]) -> None:
    svg = draw(values, may_be_log=True)
    places = [float(number) for number in NUMBER.findall(path_of(svg).removesuffix("h0"))]
    assert all(LEFT <= x <= RIGHT for x in places[::2])
    assert all(TOP <= y <= BOTTOM for y in places[1::2])


def test_an_axis_is_logarithmic_only_where_it_may_be() -> None:
    losses = {1: 1000.0, 2: 10.0, 3: 0.1}
    assert {"1000", "100", "10", "0.1"} <= set(labels(draw(losses, may_be_log=True)))
    assert "0.1" not in labels(draw(losses))


def test_ticks_are_few_and_round() -> None:
    for low, high in ((0.0, 1.0), (0.13, 0.92), (-3e-9, 5e-9), (0.0, 123456.0), (1e17, 1.1e17)):
        ticks = find_ticks(low, high)
        assert 2 <= len(ticks) <= 6
        assert all(low <= tick <= high for tick in ticks)


def test_a_chart_says_in_words_what_it_shows() -> None:
    svg = draw({step: 1 / step for step in range(1, 2001)}, may_be_log=True)
    values = "loss: 2000 values, from 0.0005 to 1; the last is 0.0005 at step 2,000."
    assert svg.findtext("desc") == f"{values} The vertical axis is logarithmic."
    assert svg.get("aria-labelledby") == "x-title x-desc"


def test_evaluations_have_dots_with_their_values_unless_they_are_many() -> None:
    dots = [*draw({10: 0.5, 20: math.nan, 30: 0.25}).iter("circle")]
    assert [dot.findtext("title") for dot in dots] == ["loss: 0.5 at step 10", "loss: 0.25 at step 30"]
    assert not [*draw(dict.fromkeys(range(1000), 1.0)).iter("circle")]
