"""Plots as inline SVG, drawn without a library. Colours come from the page's CSS and follow its theme.

Plots are 440 wide: two fit side by side on a screen, and one fills a phone with readable text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from camcal.models.report import ReliabilityBin

WIDTH, HEIGHT = 440, 290
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 18, 44


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Values from `low` to `high`; a logarithmic one needs both positive."""

    title: str
    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def share(self, value: float) -> float:
        """The position of a value: 0 at `low`, 1 at `high`; values outside are clipped."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        place = math.log(max(value, self.low)) if self.log else value
        return min(1.0, max(0.0, (place - low) / (high - low)))

    def x(self, value: float) -> float:
        return LEFT + self.share(value) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - self.share(value) * (HEIGHT - TOP - BOTTOM)


def linear_axis(title: str, values: Sequence[float]) -> Axis:
    """An axis with round ticks that covers all values."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 1, high + 1
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [round(i * step, 10) for i in range(first, last + 1)]
    return Axis(title=title, low=ticks[0], high=ticks[-1], ticks=ticks)


def log_axis(title: str, values: Sequence[float]) -> Axis:
    """A logarithmic axis that covers all values (positive), with ticks at 1, 2 and 5 times powers of ten."""
    low, high = 0.85 * min(values), 1.15 * max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    return Axis(title=title, low=low, high=high, ticks=ticks, log=True)


def percent_axis(title: str) -> Axis:
    """0 to 100."""
    return Axis(title=title, low=0, high=100, ticks=range(0, 101, 20))


@dataclass(frozen=True, kw_only=True)
class Point:
    """A mark with a tooltip; `spread` draws a bar of ± that much."""

    x: float
    y: float
    tip: str
    spread: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one colour: `style` is a class of the page's CSS."""

    style: str
    points: Sequence[Point]
    trend: bool = False


def scatter(label: str, x: Axis, y: Axis, series: Sequence[Series], *, link: bool = False) -> str:
    """Points of several series; with `link`, a thin line joins the first and last series' points of equal index."""
    parts = [_axes(x, y)]
    if link:
        pairs = zip(series[0].points, series[-1].points, strict=True)
        parts += [_line("link", x.x(a.x), y.y(a.y), x.x(b.x), y.y(b.y)) for a, b in pairs]
    for one in series:
        for p in one.points:
            if p.spread:
                parts.append(_line(f"spread {one.style}", x.x(p.x), y.y(p.y - p.spread), x.x(p.x), y.y(p.y + p.spread)))
            parts.append(_dot(one.style, x.x(p.x), y.y(p.y), p.tip))
    for one in series:
        if one.trend:
            line = " ".join(f"{x.x(px):.1f},{y.y(py):.1f}" for px, py in running_mean(one.points))
            parts.append(f'<polyline class="trend {one.style}" points="{line}"/>')
    return _svg(label, parts)


def running_mean(points: Sequence[Point]) -> list[tuple[float, float]]:
    """(x, y) running means over points in order of x; the window is a sixth of them, five at least."""
    ordered = sorted(points, key=lambda p: p.x)
    window = min(len(ordered), max(5, len(ordered) // 6))
    result = []
    for start in range(len(ordered) - window + 1):
        part = ordered[start : start + window]
        x = math.exp(sum(math.log(p.x) for p in part) / window)
        result.append((x, sum(p.y for p in part) / window))
    return result


def bars(label: str, groups: Sequence[str], series: Sequence[tuple[str, Sequence[float | None]]], title: str) -> str:
    """Vertical bars in percent: each group has one bar per (style, values) series; None is shown as n/a."""
    y = percent_axis(title)
    slot = (WIDTH - LEFT - RIGHT) / len(groups)
    width = min(34.0, 0.8 * slot / len(series))
    parts = [_y_axis(y)]
    for g, name in enumerate(groups):
        middle = LEFT + (g + 0.5) * slot
        for line, words in enumerate(name.split("\n")):
            parts.append(_text("tick", middle, HEIGHT - BOTTOM + 16 + 15 * line, words))
        for s, (style, values) in enumerate(series):
            x = middle + (s - len(series) / 2) * width
            value = values[g]
            top = y.y(value or 0)
            if value is not None:
                parts.append(_rect(f"bar {style}", x + 1, top, width - 2, HEIGHT - BOTTOM - top))
            shown = "n/a" if value is None else f"{value:.0f}" if width < 20 else f"{value:.1f}"
            parts.append(_text("value", x + width / 2, top - 4, shown))
    return _svg(label, parts)


def lines(label: str, x: Axis, y: Axis, series: Sequence[Series], mark: float | None = None) -> str:
    """Curves with their points; `mark` draws a vertical line at that x."""
    parts = [_axes(x, y)]
    if mark is not None:
        parts.append(_line("diagonal", x.x(mark), TOP, x.x(mark), HEIGHT - BOTTOM))
    for one in series:
        path = " ".join(f"{x.x(p.x):.1f},{y.y(p.y):.1f}" for p in one.points)
        parts.append(f'<polyline class="trend {one.style}" points="{path}"/>')
        parts += [_dot(one.style, x.x(p.x), y.y(p.y), p.tip) for p in one.points]
    return _svg(label, parts)


def reliability(label: str, bins: Sequence[ReliabilityBin], style: str) -> str:
    """Accuracy of each bin against its confidence, the gap to the diagonal, and below it the bins' shares.

    The plot is square, so that the diagonal is at 45°.
    """
    size, left, top, low = 226, 40, 8, 34

    def at(confidence: float, accuracy: float) -> tuple[float, float]:
        return left + confidence * size, top + (1 - accuracy) * size

    parts = []
    for tick in (0, 25, 50, 75, 100):
        x, y = at(tick / 100, tick / 100)
        parts += [_line("grid", left, y, left + size, y), _text("tick right", left - 6, y + 4, f"{tick}")]
        parts.append(_text("tick", x, top + size + low + 14, f"{tick}"))
    biggest = max(b.share for b in bins)
    for b in bins:
        (x, _), (end, _) = at(b.low, 0), at(b.high, 0)
        height = low * b.share / biggest
        parts.append(_rect("share", x + 0.5, top + size + low - height, end - x - 1, height))
        accuracy, confidence = b.accuracy, b.confidence
        if accuracy is None or confidence is None:
            continue
        (_, y), (_, wanted), (_, floor) = at(0, accuracy), at(0, confidence), at(0, 0)
        tip = f"confidence {100 * confidence:.1f} %, accuracy {100 * accuracy:.1f} %, {100 * b.share:.1f} % of images"
        parts.append(_rect(f"bar {style}", x + 0.5, y, end - x - 1, floor - y, tip))
        parts.append(_rect("gap", x + 0.5, min(y, wanted), end - x - 1, abs(y - wanted), tip))
    parts.append(_line("diagonal", *at(0, 0), *at(1, 1)))
    parts.append(_text("title", left + size / 2, top + size + low + 32, "confidence, %"))
    parts.append(_upright(left - 29, top + size / 2, "accuracy, %"))
    return _svg(label, parts, width=left + size + 14, height=top + size + low + 40)


def _svg(label: str, parts: Sequence[str], width: float = WIDTH, height: float = HEIGHT) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'


def _axes(x: Axis, y: Axis) -> str:
    parts = [_y_axis(y)]
    for tick in x.ticks:
        parts.append(_line("grid", x.x(tick), TOP, x.x(tick), HEIGHT - BOTTOM))
        parts.append(_text("tick", x.x(tick), HEIGHT - BOTTOM + 16, f"{tick:g}"))
    return "".join([*parts, _text("title", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x.title)])


def _y_axis(y: Axis) -> str:
    parts = []
    for tick in y.ticks:
        parts.append(_line("grid", LEFT, y.y(tick), WIDTH - RIGHT, y.y(tick)))
        parts.append(_text("tick right", LEFT - 6, y.y(tick) + 4, f"{tick:g}".replace("-", "−")))
    return "".join([*parts, _upright(13, (TOP + HEIGHT - BOTTOM) / 2, y.title)])


def _dot(style: str, x: float, y: float, tip: str) -> str:
    return f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="3.6"><title>{escape(tip)}</title></circle>'


def _line(style: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _rect(style: str, x: float, y: float, width: float, height: float, tip: str = "") -> str:
    title = f"<title>{escape(tip)}</title>" if tip else ""
    place = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}"'
    return f'<rect class="{style}" {place}>{title}</rect>'


def _text(style: str, x: float, y: float, words: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def _upright(x: float, y: float, words: str) -> str:
    turn = f'transform="rotate(-90 {x:.1f} {y:.1f})"'
    return f'<text class="title" x="{x:.1f}" y="{y:.1f}" {turn}>{escape(words)}</text>'
