"""A run over time as an SVG of five panels that stands by itself."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from tests.soak.journal import ORDINARY, Journal

WIDTH, LEFT, RIGHT, PANEL, GAP, TOP = 900, 70, 20, 110, 42, 30
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.title{font-weight:600}.tick{fill:#777;font-size:11px}"
    ".grid{stroke:#ddd}.line{fill:none;stroke-width:1.5}.a{stroke:#1f6f9f}.b{stroke:#d95f02}.key-a{fill:#1f6f9f}"
    ".key-b{fill:#d95f02}.kill{stroke:#c00;opacity:.35}.reload{stroke:#393;opacity:.35}.hostile{stroke:#93c;opacity:.35}"
)
Curve = tuple[str, Sequence[tuple[float, float]]]  # what it shows, and its points


def draw(journal: Journal, intervals: list[dict[str, Any]], seconds: float) -> str:
    """Requests, latency, memory, threads and descriptors. Upright lines: reloads (hostile ones violet), kills red."""
    used = [(sample.at, sample.usage) for sample in journal.samples]
    panels: list[tuple[str, list[Curve]]] = [
        ("requests per second", [("good", _rates(intervals, True)), ("bad", _rates(intervals, False))]),
        ("latency of photographs, ms", [("p50", _points(intervals, "p50_ms")), ("p99", _points(intervals, "p99_ms"))]),
        ("memory of all processes (PSS), MB", [("", [(at, usage.pss_mb) for at, usage in used])]),
        ("threads", [("", [(at, usage.threads) for at, usage in used])]),
        ("open descriptors", [("", [(at, usage.descriptors) for at, usage in used])]),
    ]
    parts = [
        _panel(title, curves, TOP + number * (PANEL + GAP), journal, seconds)
        for number, (title, curves) in enumerate(panels)
    ]
    height = TOP + len(panels) * (PANEL + GAP)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"><style>{STYLE}</style>'
    return f'{head}<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'


def _rates(intervals: list[dict[str, Any]], good: bool) -> list[tuple[float, float]]:
    points = []
    for one, after in zip(intervals, intervals[1:], strict=False):
        count = sum(sum(c.values()) for kind, c in one["requests"].items() if (kind in ORDINARY) == good)
        points.append((one["start_s"], count / (after["start_s"] - one["start_s"])))
    return points


def _points(intervals: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(one["start_s"], one[name]) for one in intervals if one[name] is not None]


def _panel(title: str, curves: list[Curve], top: float, journal: Journal, seconds: float) -> str:
    highest = 1.1 * max((y for _, points in curves for _, y in points), default=1.0) or 1.0

    def x(at: float) -> float:
        return LEFT + min(1.0, at / seconds) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return top + PANEL * (1 - value / highest)

    parts = [f'<text class="title" x="{LEFT}" y="{top - 8}">{escape(title)}</text>']
    for share in (0, 0.5, 1):
        level = y(share * highest)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level:.1f}" y2="{level:.1f}"/>')
        shown = f"{share * highest:.3g}" if highest < 1000 else f"{share * highest:.0f}"
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{level + 4:.1f}" text-anchor="end">{shown}</text>')
        at = f"{share * seconds / 60:g} min" if seconds >= 120 else f"{share * seconds:g} s"
        parts.append(
            f'<text class="tick" x="{x(share * seconds)}" y="{top + PANEL + 15}" text-anchor="middle">{at}</text>'
        )
    for event in journal.events:
        place = f'x1="{x(event.at):.1f}" x2="{x(event.at):.1f}" y1="{top}" y2="{top + PANEL}"'
        parts.append(f'<line class="{event.what.split()[0]}" {place}><title>{escape(event.what)}</title></line>')
    for number, (name, points) in enumerate(curves):
        style, line = "ab"[number], " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in points)
        parts.append(f'<polyline class="line {style}" points="{line}"/>')
        end = WIDTH - RIGHT - 60 * (len(curves) - number - 1)
        parts.append(f'<text class="key-{style}" x="{end}" y="{top - 8}" text-anchor="end">{escape(name)}</text>')
    return "".join(parts)
