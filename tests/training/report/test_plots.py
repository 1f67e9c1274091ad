import math
import re
import xml.etree.ElementTree as ET

import pytest

from camcal.models.report import ReliabilityBin
from camcal.training.report import plots
from camcal.training.report.plots import Point, Series, linear_axis, log_axis, percent_axis


def _shapes(svg: str, tag: str) -> list[dict[str, str]]:
    return [element.attrib for element in ET.fromstring(svg).iter(tag)]


def test_a_logarithmic_axis_spaces_ratios_evenly_and_has_round_ticks() -> None:
    axis = log_axis("", [5, 500])
    assert list(axis.ticks) == [5, 10, 20, 50, 100, 200, 500]
    assert axis.share(50) - axis.share(5) == pytest.approx(axis.share(500) - axis.share(50))
    assert axis.share(axis.low) == 0 and axis.share(axis.high) == 1
    assert axis.share(0) == 0


@pytest.mark.parametrize("values", [[0.0, 1.0], [-0.31, 0.04], [3.0, 3.0], [-1234.0, 7.5]])
def test_a_linear_axis_holds_all_values_between_round_ticks(values: list[float]) -> None:
    axis = linear_axis("", values)
    assert axis.low <= min(values) and max(values) <= axis.high
    steps = {round(b - a, 9) for a, b in zip(axis.ticks, axis.ticks[1:], strict=False)}
    assert len(steps) == 1 and 4 <= len(axis.ticks) <= 12
    (step,) = steps
    assert round(step / 10 ** math.floor(math.log10(step)), 6) in {1.0, 2.0, 2.5, 5.0}


def test_points_stand_where_the_axes_say() -> None:
    points = [Point(x=10, y=0, tip="low"), Point(x=1000, y=100, tip="<high>", spread=20)]
    svg = plots.scatter("a & b", log_axis("", [10, 1000]), percent_axis(""), [Series(style="trained", points=points)])
    low, high = _shapes(svg, "circle")
    assert float(low["cy"]) == plots.HEIGHT - plots.BOTTOM and float(high["cy"]) == plots.TOP
    assert plots.LEFT < float(low["cx"]) < float(high["cx"]) < plots.WIDTH - plots.RIGHT
    assert "&lt;high&gt;" in svg and 'aria-label="a &amp; b"' in svg
    (spread,) = [line for line in _shapes(svg, "line") if line["class"] == "spread trained"]
    assert float(spread["y2"]) == plots.TOP < float(spread["y1"])


def test_the_trend_of_a_straight_line_lies_on_it() -> None:
    points = [Point(x=2.0**k, y=3.0 * k, tip="") for k in range(30)]
    trend = plots.running_mean(list(reversed(points)))
    assert len(trend) == 26
    for x, y in trend:
        assert y == pytest.approx(3 * math.log2(x))


def test_bars_are_as_high_as_their_values_and_nothing_is_written_na() -> None:
    svg = plots.bars("", ["few\n2"], [("trained", [25.0]), ("calibrated", [None])], "accuracy, %")
    (bar,) = _shapes(svg, "rect")
    assert float(bar["height"]) == pytest.approx((plots.HEIGHT - plots.TOP - plots.BOTTOM) / 4, abs=0.06)
    assert "n/a" in svg and "25.0" in svg


def test_a_reliability_diagram_shows_the_gap_of_each_bin_and_skips_empty_ones() -> None:
    svg = plots.reliability(
        "",
        [
            ReliabilityBin(low=0.0, high=0.5, share=0.0, confidence=None, accuracy=None),
            ReliabilityBin(low=0.5, high=1.0, share=1.0, confidence=0.9, accuracy=0.6),
        ],
        "trained",
    )
    rects = _shapes(svg, "rect")
    assert [r["class"] for r in rects] == ["share", "share", "bar trained", "gap"]
    bar, gap = rects[2], rects[3]
    assert float(gap["height"]) == pytest.approx(0.3 / 0.6 * float(bar["height"]), abs=0.1)
    assert float(gap["y"]) + float(gap["height"]) == pytest.approx(float(bar["y"]), abs=0.1)
    assert re.search("confidence 90.0 %, accuracy 60.0 %, 100.0 % of images", svg)
