"""Crafted images, each sent alone to a real server: its status, CPU time and peak of memory."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import httpx

from tests.fuzz.findings import Findings
from tests.fuzz.images import MOST_CPU_S, ask
from tests.service.crafted import CASES
from tests.soak.server import Server, serving

SHOWN = 8  # of the most expensive files


def over_http(names: Sequence[str], bundle: Path, log: Path) -> Findings:
    """Send the files of these names one after another."""
    findings = Findings("crafted images over HTTP")
    with serving(bundle, log) as server:
        asyncio.run(_send(server, names, findings))
        code = server.stop()
    if code != 0:
        findings.faults.append(f"the server ended with code {code}")
    return findings


async def _send(server: Server, names: Sequence[str], findings: Findings) -> None:
    statuses, costs = Counter[int](), list[tuple[float, float, str, int]]()
    async with httpx.AsyncClient(base_url=server.url, timeout=120, trust_env=False) as client:
        for name in names:
            data = CASES[name]()
            before, memory = server.cpu_s(), server.start_peak()
            statuses[status := await ask(client, data)] += 1
            cpu = server.cpu_s() - before
            costs.append((cpu, server.peak_mb() - memory, name, status))
            if status >= 500 or status == 0:
                findings.faults.append(f"{name} was answered {status}")
            if cpu > MOST_CPU_S:
                findings.faults.append(f"{name} took {cpu:.2f} s of CPU time")
    for status, number in sorted(statuses.items()):
        findings.row(f"answered {status}", number)
    for cpu, memory, name, status in sorted(costs, reverse=True)[:SHOWN]:
        findings.row(name, f"{cpu:.2f} s, +{memory:.0f} MB, {status}")
    most = max(costs, key=lambda cost: cost[1])
    findings.row("most memory", f"+{most[1]:.0f} MB ({most[2]})")
