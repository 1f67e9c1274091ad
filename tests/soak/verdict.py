"""Whether a run was sound: what was promised, and what the journal shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from tests.soak.journal import ORDINARY, Event, Journal, Record, Sample

MEMORY = 1.03  # growth of memory that is allowed
THREADS, DESCRIPTORS = 2, 5  # how many more at the end are no growth: pools fill, connections happen to be open
REFUSED = 0.01  # share of good requests that may be answered 429
AFTER_KILL_S = 20.0  # for which a killed worker's connections may end, and its heatmaps be missing
AFTER_EVENT_S = 25.0  # for which a sample is not compared: two models are in memory, or a worker starts
SETTLED_S = 600.0  # from then on nothing grows
SHORTEST_S = 1200.0  # a shorter run cannot show growth

EXCUSED = {"reset", "refused", "closed", "404", "503"}
Choice = Callable[[list[float]], float]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One promise. `met` is None where the run was too short to tell."""

    promise: str
    met: bool | None
    found: str


def judge(journal: Journal, seconds: float, exit_code: int | None, log: str) -> list[Check]:
    """All promises, in the order in which they are reported."""
    return [
        _requests("no 5xx", journal, lambda record: record.outcome[0] == "5"),
        _requests("good requests are answered", journal, _is_lost),
        _overload(journal.records),
        _reloads(journal.events),
        *_growth(journal, seconds),
        Check(promise="SIGTERM ends it with code 0", met=exit_code == 0, found=f"code {exit_code}"),
        Check(promise="no trace in the log", met="Traceback" not in log, found=f"{log.count('Traceback')} traces"),
    ]


def _is_lost(record: Record) -> bool:
    return record.kind in ORDINARY and record.outcome not in ("200", "429") and record.outcome[0] != "5"


def unexplained(journal: Journal, wrong: Callable[[Record], bool]) -> list[Record]:
    """Those that no killed process explains."""
    kills = [event.at for event in journal.events if event.what.startswith("kill")]

    def explained(record: Record) -> bool:
        during = any(record.at - 0.1 <= at + AFTER_KILL_S and record.at + record.seconds >= at for at in kills)
        return record.outcome in EXCUSED and during

    return [record for record in journal.records if wrong(record) and not explained(record)]


def _requests(promise: str, journal: Journal, wrong: Callable[[Record], bool]) -> Check:
    found = unexplained(journal, wrong)
    shown = "; ".join(f"{r.kind} {r.outcome} at {r.at:.0f} s {r.what}".strip() for r in found[:5])
    return Check(promise=promise, met=not found, found=f"{len(found)} of {len(journal.records)} {shown}".strip())


def _overload(records: Sequence[Record]) -> Check:
    ordinary = [record for record in records if record.kind in (*ORDINARY, "unsent")]
    refused = sum(record.outcome in ("429", "left", "late") for record in ordinary)
    share = refused / max(1, len(ordinary))
    return Check(
        promise="load stays below capacity", met=share <= REFUSED, found=f"{100 * share:.2f} % refused or not sent"
    )


def _reloads(events: Sequence[Event]) -> Check:
    reloads = [event.detail for event in events if event.what == "reload"]
    lost = [detail for detail in reloads if detail.endswith("never")]
    return Check(promise="good bundles are served", met=not lost, found=f"{len(reloads) - len(lost)} of {len(reloads)}")


def _growth(journal: Journal, seconds: float) -> list[Check]:
    """From the first fifth after all has settled to the last fifth: medians of memory, minima of what may leak."""
    settled = SETTLED_S if seconds >= SHORTEST_S else seconds / 6
    quiet = [
        sample
        for sample in journal.samples
        if settled <= sample.at <= seconds and not any(0 <= sample.at - e.at < AFTER_EVENT_S for e in journal.events)
    ] or journal.samples
    part = max(1, len(quiet) // 5)
    first, last = quiet[:part], quiet[-part:]

    def check(name: str, value: Callable[[Sample], float], choose: Choice, most: float) -> Check:
        before, after = choose([value(s) for s in first]), choose([value(s) for s in last])
        limit = before * most if most < 2 else before + most
        met = after <= limit if seconds >= SHORTEST_S else None
        peak = max(value(sample) for sample in journal.samples)
        return Check(promise=f"{name} does not grow", met=met, found=f"{before:.0f} → {after:.0f}, at most {peak:.0f}")

    return [
        check("memory (PSS, MB)", lambda sample: sample.usage.pss_mb, median, MEMORY),
        check("number of threads", lambda sample: sample.usage.threads, min, THREADS),
        check("number of open descriptors", lambda sample: sample.usage.descriptors, min, DESCRIPTORS),
    ]
