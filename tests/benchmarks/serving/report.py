"""The results as Markdown: tables of every server, and the figures that the serving engine promises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tests.benchmarks.serving.servers import OURS, SERVERS
from tests.benchmarks.serving.summary import Spread, ratio, spread

TITLES = {
    "camcal": "camcal, one worker per core",
    "camcal-1": "camcal, one process",
    "fastapi": "FastAPI, `def` endpoint",
    "litserve": "LitServe",
    "bentoml": "BentoML",
    "ray": "Ray Serve, HAProxy",
}
INTRO = """\
# Serving, side by side

`make bench-serving` writes this page. [serving.json](serving.json) has the figures of every round; the tables have
medians over the rounds.

All servers have the same ONNX file and the same {photos}, {decoder}. In each
round every server is started, warmed up, loaded and stopped, one after another in changing order. The load generator
runs on the same {cores} cores ({cpu}). Against a server that does nothing it makes
{generator:.0f} requests/s and takes {cpu_us:.0f} µs of CPU for each.

The head of each file in `tests/benchmarks/serving/apps/` says how that server is set up, and which page of its
documentation advises it. camcal answers with five classes and stores their heatmaps, once with one worker per core and
once as one process. The others answer with five classes and make no maps. The *ceiling* is decoding and inference in
one process without HTTP, the best of three ways to use the cores, measured in the same rounds.
"""
DECODERS = {
    "camcal": "each with camcal's own decoder, so that what differs is the server",
    "pillow": "camcal with its own decoder and the others with Pillow, as their documentation does",
}

TARGETS = {
    "of the ceiling, 32 clients": "≥ 0.9",
    "times the best other server's rate, 32 clients": "≥ 1.4",
    "times the best other server's p99, 32 clients": "≤ 0.8",
    "p50 over decoding and inference, one client, ms": "≤ 2",
    "rate with maps, of that without": "≥ 0.97",
    "ready after, s": "≤ 2",
    "memory, MB": "≤ 300",
}

Entry = dict[str, Any]
Get = Callable[[Entry], float | None]


def markdown(results: dict[str, Any]) -> str:
    """The whole page."""
    hardware, generator = results["hardware"], results["generator"]
    page = INTRO.format(
        photos="64 photographs (JPEG, 500×375, 57 KB)",
        decoder=DECODERS[results["decoder"]],
        cores=hardware["cores"],
        cpu=hardware["cpu"],
        generator=generator["rate"],
        cpu_us=generator["cpu_us"],
    )
    parts = [page, *(_model(name, model) for name, model in results["models"].items() if model["rounds"])]
    if growth := results.get("growth"):
        samples = growth["samples"]
        parts.append(
            f"## Memory over {samples[-1]['requests']:,} requests\n\n{growth['date'][:10]}, at {growth['commit']}: "
            f"{samples[-1]['memory_mb']:.0f} MB at the end, {growth['growth']:+.1%} since the first tenth; "
            f"{sum(s['errors'] for s in samples)} errors.\n"
        )
    return "\n".join(parts)


def _model(name: str, model: Entry) -> str:
    about, rounds = model["bundle"], model["rounds"]
    title = f"## {about['name']}: {about['backbone']} at {about['input_size']}², {about['classes']} classes"
    counts = list(next(iter(rounds[0]["servers"].values()))["closed"]) if rounds[0]["servers"] else []
    ceiling = _value(_ceiling(rounds, "best"), "{:.0f}")
    lines = [
        title,
        "",
        f"{model['date'][:10]}, at {model['commit']}, {len(rounds)} rounds, {model['minutes']:.0f} minutes. "
        f"Ceiling: {ceiling} images/s; one image alone takes "
        f"{_value(_ceiling(rounds, 'decode_inference_ms'), '{:.1f}')} ms "
        f"(decoding {_value(_ceiling(rounds, 'decode_ms'), '{:.1f}')}, "
        f"inference {_value(_ceiling(rounds, 'inference_ms'), '{:.1f}')}).",
        "",
        "Responses per second:",
        "",
        *_throughput(rounds, counts),
        "",
        "Latency, p50 / p99 in ms (open loops: Poisson arrivals at 80 % of each server's own peak, and at 60 % of the "
        "ceiling for all):",
        "",
        *_latency(rounds, counts),
        "",
        "What each server costs:",
        "",
        *_costs(rounds),
        "",
        *(f"- {TITLES[server]} failed: {reason}" for server, reason in model["failed"].items()),
        "",
        *_promises(rounds),
        "",
    ]
    return "\n".join(lines)


def _names(rounds: Sequence[Entry]) -> list[str]:
    return [name for name in SERVERS if any(name in entry["servers"] for entry in rounds)]


def _series(rounds: Sequence[Entry], name: str, get: Get) -> list[float | None]:
    return [get(entry["servers"][name]) if name in entry["servers"] else None for entry in rounds]


def _ceiling(rounds: Sequence[Entry], key: str) -> list[float | None]:
    return [entry["ceiling"][key] for entry in rounds]


def _closed(count: str, key: str) -> Get:
    return lambda entry: entry["closed"].get(count, {}).get(key)


def _open(step: str, key: str) -> Get:
    return lambda entry: entry.get(step, {}).get(key)


def _value(values: Sequence[float | None], form: str) -> str:
    found = spread(values)
    return "–" if found is None else form.format(found["median"])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]


def _clients(counts: Sequence[str]) -> list[str]:
    return [f"{count} client{'s' * (count != '1')}" for count in counts]


def _throughput(rounds: Sequence[Entry], counts: Sequence[str]) -> list[str]:
    rows = []
    for name in _names(rounds):
        series = [_series(rounds, name, _closed(count, "rate")) for count in counts]
        best = [max((v for v in column if v is not None), default=None) for column in zip(*series, strict=True)]
        share = ratio(best, _ceiling(rounds, "best"))
        cells = [_value(values, "{:.0f}" if name else "") for values in series]
        rows.append([TITLES[name], *cells, "–" if share is None else f"{share['median']:.0%}"])
    return _table(["", *_clients(counts), "best, of the ceiling"], rows)


def _latency(rounds: Sequence[Entry], counts: Sequence[str]) -> list[str]:
    def cell(name: str, get: Callable[[str], Get]) -> str:
        return " / ".join(_value(_series(rounds, name, get(key)), "{:.0f}") for key in ("p50_ms", "p99_ms"))

    steps = [*(partial(_closed, count) for count in counts), partial(_open, "open"), partial(_open, "same")]
    rows = [[TITLES[name], *(cell(name, step) for step in steps)] for name in _names(rounds)]
    return _table(["", *_clients(counts), "80 % of its peak", "60 % of the ceiling"], rows)


def _errors(entry: Entry) -> float:
    steps = [*entry["closed"].values(), *(entry[step] for step in ("open", "same") if step in entry)]
    return float(sum(sum(step["errors"].values()) for step in steps))


def _costs(rounds: Sequence[Entry]) -> list[str]:
    reference = next((e["servers"][name]["top1"] for e in rounds for name in OURS if name in e["servers"]), None)

    def agreement(entry: Entry) -> float | None:
        if reference is None:
            return None
        return float(sum(a == b for a, b in zip(reference, entry["top1"], strict=True)) / len(reference))

    rows = [
        [
            TITLES[name],
            _value(_series(rounds, name, lambda entry: entry["ready_s"]), "{:.1f}"),
            _value(_series(rounds, name, lambda entry: entry["memory_mb"]), "{:.0f}"),
            _value(_series(rounds, name, _errors), "{:.0f}"),
            _value(_series(rounds, name, agreement), "{:.0%}"),
        ]
        for name in _names(rounds)
    ]
    head = ["", "first prediction after, s", "memory, MB (PSS, all processes)", "errors", "same top-1 as camcal"]
    return _table(head, rows)


def _promises(rounds: Sequence[Entry]) -> list[str]:
    """Each figure that was promised of camcal, with its target; nothing if camcal was not measured."""
    ours = [name for name in _names(rounds) if name in OURS]
    if not ours:
        return []
    columns = [_promised(rounds, name) for name in ours]
    rows = [[promise, *(column[promise] for column in columns), target] for promise, target in TARGETS.items()]
    tables = _table(["median (range over the rounds)", *(TITLES[name] for name in ours), "target"], rows)
    for name in ours:
        found = next(
            (e["servers"][name]["overload"] for e in rounds[::-1] if "overload" in e["servers"].get(name, {})), None
        )
        tables += ["", *_overload(name, found)] if found else []
    return tables


def _promised(rounds: Sequence[Entry], name: str) -> dict[str, str]:
    others = [other for other in _names(rounds) if other not in OURS]
    rate = _series(rounds, name, _closed("32", "rate"))
    p99 = _series(rounds, name, _closed("32", "p99_ms"))
    alone = _series(rounds, name, _closed("1", "p50_ms"))
    added = [a - b if a and b else None for a, b in zip(alone, _ceiling(rounds, "decode_inference_ms"), strict=True)]
    pairs = [pair for e in rounds for pair in e["servers"].get(name, {}).get("maps", [])]
    found = [
        ratio(rate, _ceiling(rounds, "best")),
        _against(rounds, others, rate, "rate", max),
        _against(rounds, others, p99, "p99_ms", min),
        spread(added),
        ratio([pair["on"] for pair in pairs], [pair["off"] for pair in pairs]),
        spread(_series(rounds, name, lambda entry: entry["ready_s"])),
        spread(_series(rounds, name, lambda entry: entry["memory_mb"])),
    ]
    return dict(zip(TARGETS, map(_spread, found), strict=True))


def _against(
    rounds: Sequence[Entry], others: Sequence[str], ours: Sequence[float | None], key: str, best: Callable[..., float]
) -> Spread | None:
    theirs = [
        best((v for v in values if v is not None), default=None)
        for values in zip(*(_series(rounds, name, _closed("32", key)) for name in others), strict=True)
    ]
    return ratio(ours, theirs) if theirs else None


def _spread(value: Spread | None) -> str:
    return "–" if value is None else f"{value['median']:.2f} ({value['low']:.2f}–{value['high']:.2f})"


def _overload(name: str, o: Entry) -> list[str]:
    return [
        f"{TITLES[name]}: overload, open loop at three times capacity: {o['offered']:.0f} requests/s offered, "
        f"{o['goodput']:.0f} answered ({o['goodput'] / o['peak']:.0%} of peak; target ≥ 90 %), {o['refused']} refused, "
        f"{o['server_errors']} 5xx and {o['unanswered']} without an answer (target 0); the slowest was answered or "
        f"refused after {o['slowest_s']:.2f} s (target ≤ 1 s)."
    ]
