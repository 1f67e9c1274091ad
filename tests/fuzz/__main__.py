"""Fuzzes the service and prints what it found; the exit code is 1 if there was a fault."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tests.fuzz import api, cases, images, parsers
from tests.fuzz.findings import Findings
from tests.fuzz.targets import BUNDLE
from tests.service.crafted import CASES

console = Console(soft_wrap=True, highlight=False)
app = typer.Typer(add_completion=False)


@app.command()
def fuzz(
    only: Annotated[list[str] | None, typer.Argument(help="decode, http, crafted, parsers or api; else all.")] = None,
    count: Annotated[int, typer.Option(help="Mutated images, both to decode and to send.")] = 20_000,
    runs: Annotated[int, typer.Option(help="Inputs for each parser.")] = 50_000,
    examples: Annotated[int, typer.Option(help="Requests for each operation and phase of openapi.yaml.")] = 100,
    seed: Annotated[int, typer.Option(help="The same seed gives the same files.")] = 0,
) -> None:
    """Fuzz the service."""
    with tempfile.TemporaryDirectory(prefix="camcal-fuzz-") as name:
        log = Path(name) / "server.log"
        parts: dict[str, Callable[[], Findings]] = {
            "decode": lambda: images.decoded(count, seed),
            "http": lambda: images.over_http(count, seed, BUNDLE, log),
            "crafted": lambda: cases.over_http(list(CASES), BUNDLE, log),
            "parsers": lambda: parsers.guided(runs, seed),
            "api": lambda: api.requests(examples, seed, BUNDLE, Path(name)),
        }
        if unknown := set(only or ()) - parts.keys():
            raise typer.BadParameter(f"{', '.join(sorted(unknown))}; expected {', '.join(parts)}")
        faults = sum(_report(parts[part]) for part in only or parts)
    raise typer.Exit(int(faults > 0))


def _report(part: Callable[[], Findings]) -> int:
    """Print what one part found; how many faults."""
    began = time.monotonic()
    findings = part()
    table = Table(findings.part, f"{time.monotonic() - began:.0f} s", box=None, title_justify="left")
    for row in findings.rows:
        table.add_row(*row)
    console.print(table)
    for fault in findings.faults:
        console.print(f"FAULT {fault}", markup=False)
    console.print(f"{len(findings.faults)} faults\n")
    return len(findings.faults)


if __name__ == "__main__":
    app()
