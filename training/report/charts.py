"""The plots of the report's page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from camcal.models.report import ClassFigures, Figures, Report
from camcal.training.report import plots
from camcal.training.report.plots import Point, Series
from camcal.training.report.summary import steps_for_prior, steps_taken

End = Literal["trained", "calibrated"]
ENDS: tuple[End, ...] = ("trained", "calibrated")
COUNT_AXIS = "training images of the class (logarithmic)"
FEW_CLASSES = 30
"""Up to so many, lines join the two dots of each class; of more, a running mean is drawn."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A plot with its caption."""

    title: str
    caption: str
    svg: Markup


def _chart(title: str, caption: str, svg: str) -> Chart:
    return Chart(title=title, caption=caption, svg=Markup(svg))


def accuracy(report: Report) -> list[Chart]:
    """Accuracy of each class against its training images, and of groups of classes."""
    rows, few = report.per_class, len(report.per_class) <= FEW_CLASSES
    series = [Series(style=step, trend=not few, points=_accuracy_points(rows, step)) for step in ENDS]
    x, y = plots.log_axis(COUNT_AXIS, [row.train_count for row in rows]), plots.percent_axis("accuracy, %")
    each = plots.scatter("Accuracy of each class against its training images", x, y, series, link=few)
    names = [f"{g}\n{n}" for g, n in [*report.data.groups.items(), *report.rank_groups.sizes.items()]]
    values = [(step, [*report.test[step].groups.values(), *report.rank_groups.test[step].values()]) for step in ENDS]
    percent = [(step, [None if v is None else 100 * v for v in found]) for step, found in values]
    groups = plots.bars("Accuracy of each group of classes, as trained and calibrated", names, percent, "accuracy, %")
    return [
        _chart("Every class", "Accuracy against training images; point at a dot for its class.", each),
        _chart(
            "By group",
            "By training images, and by rank (36, 35 and 29 % of the classes); number of classes below.",
            groups,
        ),
    ]


def reliability(report: Report) -> list[Chart]:
    """A reliability diagram for each step, and for each end under the training prior."""
    found = []
    for step, name in steps_taken(report).items():
        style = "calibrated" if step == "calibrated" else "trained"
        svg = plots.reliability(f"Reliability diagram, {name}, balanced prior", report.reliability[step], style)
        found.append(_chart(name, f"balanced prior, {_error(report.test[step])}", svg))
    names = steps_for_prior(report)
    for end in ENDS:
        bins = report.reliability_under_train_prior[end]
        svg = plots.reliability(f"Reliability diagram, {names[end]}, training prior", bins, end)
        found.append(_chart(names[end], f"training prior, {_error(report.test_under_train_prior[end])}", svg))
    return found


def _error(figures: Figures) -> str:
    by_chance = f"{100 * figures.ece_by_chance:.1f} by chance"
    return f"ECE {100 * figures.ece:.1f}\u00a0% ({by_chance})"


def scalar(report: Report) -> list[Chart]:
    """Accuracy and calibration error against the scalar."""
    curve = report.scalar_curve or []
    same = all(math.isclose(point.nll, point.adjusted_nll, rel_tol=1e-6) for point in curve)
    accuracy = {
        "calibrated": [p.adjusted_accuracy for p in curve],
        "held-out": [p.holdout_adjusted_accuracy for p in curve],
    }
    error = {"calibrated": [p.adjusted_ece for p in curve], "held-out": [p.holdout_adjusted_ece for p in curve]}
    caption = f"Test (filled) and held-out part (dashed){'' if same else ', class prior subtracted'}"
    if same:
        return [_curve(report, "Accuracy", caption, accuracy), _curve(report, "Calibration error", caption, error)]
    error["trained"] = [p.ece for p in curve]
    return [
        _curve(report, "Accuracy", caption, accuracy),
        _curve(report, "Calibration error", f"{caption}; with the prior: test (hollow)", error),
    ]


def _curve(report: Report, name: str, caption: str, series: dict[str, list[float]]) -> Chart:
    scalars = [point.scalar for point in report.scalar_curve or []]
    drawn = [
        Series(
            style=style,
            points=[
                Point(x=s, y=100 * value, tip=f"scalar {s:.3g}: {100 * value:.1f} %")
                for s, value in zip(scalars, values, strict=True)
            ],
        )
        for style, values in series.items()
    ]
    x = plots.log_axis("scalar (logarithmic)", scalars)
    y = plots.linear_axis(f"{name.lower()}, %", [0.0, *(p.y for one in drawn for p in one.points)])
    svg = plots.lines(f"{name} against the scalar", x, y, drawn, mark=report.calibration.scalar)
    return _chart(name, f"{caption}.", svg)


def margins(report: Report) -> list[Chart]:
    """Margin of each class before and, where it moved, after calibration."""
    rows = report.per_class
    x = plots.log_axis(COUNT_AXIS, [row.train_count for row in rows])
    shown: dict[End, str] = {"trained": "Before calibration"}
    if "marc" in steps_taken(report):
        shown["calibrated"] = "After calibration"
    found = []
    for step, name in shown.items():
        points = _margin_points(rows, step)
        y = plots.linear_axis("margin", [end for p in points for end in (p.y - p.spread, p.y + p.spread)])
        series = [Series(style=step, points=points, trend=len(rows) > FEW_CLASSES)]
        svg = plots.scatter(f"{name}: margin of each class against its training images", x, y, series)
        found.append(_chart(name, "Mean over the class's test images, ± one standard deviation.", svg))
    return found


def _accuracy_points(rows: Sequence[ClassFigures], step: End) -> list[Point]:
    """A point for each class that has test images; the tooltip names the class."""
    found = [(row, row.accuracy_trained if step == "trained" else row.accuracy_calibrated) for row in rows]
    return [_point(row, 100 * accuracy) for row, accuracy in found if accuracy is not None]


def _margin_points(rows: Sequence[ClassFigures], step: End) -> list[Point]:
    found = [
        (row, row.margin_trained, row.margin_spread_trained)
        if step == "trained"
        else (row, row.margin_calibrated, row.margin_spread_calibrated)
        for row in rows
    ]
    return [_point(row, margin, spread or 0.0) for row, margin, spread in found if margin is not None]


def _point(row: ClassFigures, value: float, spread: float = 0.0) -> Point:
    tip = f"{row.name}: {value:.3g}, {row.train_count} training images"
    return Point(x=row.train_count, y=value, spread=spread, tip=tip)
