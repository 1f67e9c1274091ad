"""From what a load generator noted to the figures of the tables."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypedDict

import numpy as np

Record = tuple[float, float, int]  # start (s), latency (s), HTTP status; 0 for no answer


class Figures(TypedDict):
    """Of one stretch of load. Rates count answers with status 200 only; latencies are theirs."""

    requests: int
    rate: float
    p50_ms: float | None
    p99_ms: float | None
    max_ms: float | None
    errors: dict[str, int]


def closed_loop(records: Iterable[Record], skip_s: float, seconds: float) -> Figures:
    """Of a closed loop: latencies and errors of answers that came between `skip_s` and `skip_s + seconds`.

    For the rate, a request counts with the share of its time that lies in this stretch: answers of one batch come all
    at once, and counting them by their end alone would make the rate of a few large batches a matter of luck.
    """
    records, end_s = list(records), skip_s + seconds
    figures = _figures([r for r in records if skip_s <= r[0] + r[1] < end_s], seconds)
    shares = (
        max(0.0, min(start + latency, end_s) - max(start, skip_s)) / latency
        for start, latency, status in records
        if status == 200
    )
    figures["rate"] = sum(shares) / seconds
    return figures


def open_loop(records: Iterable[Record], skip_s: float, seconds: float) -> Figures:
    """Of an open loop: requests that were due between `skip_s` and `skip_s + seconds`, whenever they ended."""
    return _figures([r for r in records if skip_s <= r[0] < skip_s + seconds], seconds)


def _figures(records: Sequence[Record], seconds: float) -> Figures:
    latencies_ms = 1000 * np.array([latency for _, latency, status in records if status == 200])
    p50, p99, worst = np.percentile(latencies_ms, [50, 99, 100]).tolist() if len(latencies_ms) else (None,) * 3
    errors = Counter(str(status or "no answer") for _, _, status in records if status != 200)
    return Figures(
        requests=len(records),
        rate=len(latencies_ms) / seconds,
        p50_ms=p50,
        p99_ms=p99,
        max_ms=worst,
        errors=dict(sorted(errors.items())),
    )


class Spread(TypedDict):
    """The median over the rounds of a run, and their range."""

    median: float
    low: float
    high: float


def spread(values: Iterable[float | None]) -> Spread | None:
    """Median and range of the values that are there; None if there are none."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    return Spread(median=statistics.median(found), low=min(found), high=max(found))


def ratio(above: Sequence[float | None], below: Sequence[float | None]) -> Spread | None:
    """Of two series measured in the same rounds: the quotient of each round, so that a slow round weighs on both."""
    pairs = zip(above, below, strict=True)
    return spread(a / b if a is not None and b else None for a, b in pairs)


class Overload(TypedDict):
    """Of an open loop far beyond capacity."""

    offered: float
    goodput: float
    refused: int
    server_errors: int
    unanswered: int
    slowest_s: float


def overload(records: Sequence[Record], seconds: float) -> Overload:
    """Who was served, who was refused (4xx), and how long the slowest of all waited for either.

    Goodput counts answers within the `seconds`, not those that a long queue gives afterwards.

    Raises:
        ValueError: if there are no records.
    """
    if not records:
        raise ValueError("no requests were sent")
    statuses = Counter(status for _, _, status in records)
    return Overload(
        offered=len(records) / seconds,
        goodput=sum(status == 200 and start + latency < seconds for start, latency, status in records) / seconds,
        refused=sum(n for status, n in statuses.items() if 400 <= status < 500),
        server_errors=sum(n for status, n in statuses.items() if status >= 500),
        unanswered=statuses[0],
        slowest_s=max(latency for _, latency, _ in records),
    )
