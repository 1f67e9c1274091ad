"""What happened during a run: every request, every fault, and a sample of the server's usage every few seconds."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.soak.server import Usage

PHOTOS = ("predict", "predict-form")  # whose latency is drawn
ORDINARY = (*PHOTOS, "batch", "cam", "v2-json", "v2-binary", "other")  # what has to be answered


@dataclass(frozen=True, kw_only=True)
class Record:
    """One request. `outcome` is a status, or `reset`, `refused`, `timeout`, `closed`, `left` where there is none."""

    at: float  # when it was due, in seconds from the start of the run
    kind: str
    outcome: str
    seconds: float
    what: str = ""  # the file that was sent, if it was a bad one


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing done to the server."""

    at: float
    what: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The server at one moment."""

    at: float
    usage: Usage


@dataclass
class Journal:
    """All of it, in order."""

    began: float = field(default_factory=time.monotonic)
    records: list[Record] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def start(self) -> None:
        """Forget what was before, and count from now."""
        self.began = time.monotonic()
        self.records.clear()

    def bad(self) -> list[Record]:
        """Bad files that were sent."""
        return [record for record in self.records if record.what]

    def now(self) -> float:
        return time.monotonic() - self.began

    def note(self, kind: str, outcome: str, at: float, what: str = "") -> None:
        self.records.append(Record(at=at, kind=kind, outcome=outcome, seconds=self.now() - at, what=what))

    def event(self, what: str, detail: str, at: float | None = None) -> None:
        self.events.append(Event(at=self.now() if at is None else at, what=what, detail=detail))

    def interval(self, start: float, end: float) -> dict[str, Any]:
        """Requests by kind and outcome that were due in an interval, and percentiles of photographs' latency."""
        records = [record for record in self.records if start <= record.at < end]
        counts: dict[str, Counter[str]] = {}
        for record in records:
            counts.setdefault(record.kind, Counter())[record.outcome] += 1
        latencies = [record.seconds for record in records if record.kind in PHOTOS and record.outcome == "200"]
        p50, p99 = np.percentile(latencies, [50, 99]) * 1000 if latencies else (None, None)
        shown = {"p50_ms": p50 and round(p50, 1), "p99_ms": p99 and round(p99, 1)}
        return {"start_s": start, "requests": {kind: dict(count) for kind, count in counts.items()}, **shown}
