"""Runs the service under mixed traffic and faults, writes what happened, and fails if a promise was broken."""

from __future__ import annotations

import asyncio
import json
import tempfile
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from camcal.service.settings import DEFAULT_BUNDLE
from tests.soak.drawing import draw
from tests.soak.faults import Current
from tests.soak.journal import Journal
from tests.soak.nuisance import write_cases
from tests.soak.run import Plan, run
from tests.soak.server import serving
from tests.soak.verdict import Check, judge, unexplained

console = Console()
app = typer.Typer(add_completion=False)


@app.command()
def soak(
    minutes: Annotated[float, typer.Option(help="How long; growth is judged from 20 minutes on.")] = 60,
    workers: Annotated[int, typer.Option(help="Workers of the server.")] = 2,
    share: Annotated[float, typer.Option(help="Load as a share of the measured capacity.")] = 0.6,
    every: Annotated[float, typer.Option(help="Seconds between samples.")] = 10,
    faults_every: Annotated[float, typer.Option(help="Seconds between reloads and killed processes.")] = 60,
    bad_every: Annotated[float, typer.Option(help="Seconds between crafted files; other bad input in proportion.")] = 2,
    cases: Annotated[int | None, typer.Option(help="Use so many of the crafted files; all by default.")] = None,
    bundle: Annotated[Path, typer.Option(help="Bundle to serve.")] = DEFAULT_BUNDLE,
    out: Annotated[Path, typer.Option(help="Folder for soak.json, soak.svg and server.log.")] = Path("runs/soak"),
    seed: Annotated[int, typer.Option(help="Seed of all that is chosen at random.")] = 0,
) -> None:
    """Soak the service. The exit code is 1 if a promise was broken."""
    plan = Plan(
        seconds=60 * minutes,
        workers=workers,
        share=share,
        samples_every=every,
        faults_every=faults_every,
        bad_every=bad_every,
        seed=seed,
    )
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="camcal-soak-") as name:
        work = Path(name)
        console.print("Building crafted files and bundles")
        files, current = write_cases(work / "cases", cases), Current(bundle.resolve(), work)
        environment = {"CAMCAL_WORKERS": str(workers), "CAMCAL_DRAIN_S": "1"}
        with serving(current.link, out / "server.log", **environment) as server:
            console.print(f"Soaking {server.url} for {minutes:g} minutes")
            journal, rate = asyncio.run(run(plan, server, current, files, work / "photos"))
            exit_code = server.stop()
    checks = judge(journal, plan.seconds, exit_code, (out / "server.log").read_text(errors="replace"))
    _write(out, plan, journal, rate, checks)
    _show(journal, checks)
    if any(check.met is False for check in checks):
        raise typer.Exit(1)


def _write(out: Path, plan: Plan, journal: Journal, rate: float, checks: list[Check]) -> None:
    edges = [*np.arange(0, plan.seconds, plan.samples_every), plan.seconds]
    intervals = [journal.interval(start, end) for start, end in pairwise(map(float, edges))]
    failed = unexplained(journal, lambda record: record.outcome[0] == "5" or not record.outcome.isdecimal())
    report: dict[str, Any] = {
        "plan": asdict(plan),
        "rate": round(rate, 1),
        "checks": [asdict(check) for check in checks],
        "total": journal.interval(0, plan.seconds),
        "slowest_bad": [asdict(r) for r in sorted(journal.bad(), key=lambda r: -r.seconds)[:20]],
        "failed": [asdict(record) for record in failed if record.outcome != "left"][:200],
        "events": [asdict(event) for event in journal.events],
        "samples": [{"at": round(sample.at, 1), **asdict(sample.usage)} for sample in journal.samples],
        "intervals": intervals,
    }
    (out / "soak.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "soak.svg").write_text(draw(journal, intervals, plan.seconds))
    console.print(f"{out}/soak.json, {out}/soak.svg; {rate:.0f} requests per second were sent")


def _show(journal: Journal, checks: list[Check]) -> None:
    total = journal.interval(0, float("inf"))
    table = Table("requests", "outcomes", box=None)
    for kind, counts in sorted(total["requests"].items()):
        table.add_row(kind, ", ".join(f"{outcome}: {count}" for outcome, count in sorted(counts.items())))
    console.print(table)
    console.print(f"photographs: p50 {total['p50_ms']} ms, p99 {total['p99_ms']} ms")
    for check in checks:
        word = {True: "met", False: "NOT MET", None: "not judged"}[check.met]
        console.print(f"{word:10s} {check.promise}: {check.found}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
