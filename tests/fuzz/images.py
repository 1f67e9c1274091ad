"""Mutated images: decoded in this process, and sent to a real server."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import httpx

from camcal.models.preprocessing import Preprocessing
from camcal.service.engine.decoding import (
    ImageTooLargeError,
    Limits,
    UndecodableImageError,
    UnsupportedFormatError,
    decode,
)
from tests.fuzz.findings import Findings
from tests.fuzz.mutations import mutants
from tests.soak.server import Server, serving

RULE = Preprocessing(fit="crop", resize=36, input_size=32, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
LIMITS = Limits(max_bytes=20_000_000, max_pixels=50_000_000, large_bytes=512 * 2**20, decode_cpu_s=2.0)
MOST_CPU_S = 2.0  # that one file may take
FLAT = 1.1  # growth of memory in the second half: the allocator keeps what its threads once held, up to a level
SUSPICIOUS_S = 1.0  # an answer that took longer is asked for again, alone, to measure its CPU time
CLIENTS = 4


def decoded(count: int, seed: int) -> Findings:
    """Decode mutants one after another."""
    findings, outcomes, slowest = Findings("decoding of mutants"), Counter[str](), (0.0, "")
    for name, data in mutants(count, seed):
        began = time.process_time()
        try:
            decode(data, RULE, LIMITS)
            outcomes["decoded"] += 1
        except (ImageTooLargeError, UndecodableImageError, UnsupportedFormatError) as error:
            outcomes[type(error).__name__] += 1
        except Exception as error:
            findings.faults.append(f"{name}: {type(error).__name__}: {error}")
        slowest = max(slowest, (time.process_time() - began, name))
    for outcome, number in sorted(outcomes.items()):
        findings.row(outcome, number)
    findings.row("most CPU time", f"{slowest[0]:.2f} s ({slowest[1]})")
    if slowest[0] > MOST_CPU_S:
        findings.faults.append(f"{slowest[1]} took {slowest[0]:.2f} s of CPU time")
    return findings


def over_http(count: int, seed: int, bundle: Path, log: Path) -> Findings:
    """Send mutants to a server over a few connections."""
    findings = Findings("mutants over HTTP")
    with serving(bundle, log, CAMCAL_CAM_MAX_BYTES=str(2**20)) as server:  # or heatmaps fill it for long
        asyncio.run(_send(server, count, seed, findings))
        code = server.stop()
    if code != 0:
        findings.faults.append(f"the server ended with code {code}")
    return findings


async def _send(server: Server, count: int, seed: int, findings: Findings) -> None:
    statuses, suspicious = Counter[int](), list[tuple[str, bytes]]()
    warm_up = max(1, count // 2)
    files = mutants(count, seed)
    await _clients(server, islice(files, warm_up), statuses, suspicious)
    before = server.usage()
    await _clients(server, files, statuses, suspicious)
    after = server.usage()
    for status, number in sorted(statuses.items()):
        findings.row(f"answered {status}", number)
        if status >= 500 or status == 0:
            findings.faults.append(f"{number} answered {status}")
    worst = max([(await cpu_of(server, data), name) for name, data in suspicious], default=(0.0, "none over a second"))
    findings.row("most CPU time", f"{worst[0]:.2f} s ({worst[1]})")
    findings.row("memory (PSS), MB", f"{before.pss_mb:.0f} → {after.pss_mb:.0f}")
    if worst[0] > MOST_CPU_S:
        findings.faults.append(f"{worst[1]} took {worst[0]:.2f} s of CPU time")
    if after.pss_mb > FLAT * before.pss_mb:
        findings.faults.append(f"memory grew from {before.pss_mb:.0f} to {after.pss_mb:.0f} MB")


async def _clients(
    server: Server, files: Iterable[tuple[str, bytes]], statuses: Counter[int], suspicious: list[tuple[str, bytes]]
) -> None:
    left = iter(files)

    async def client() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as connection:
            for name, data in left:
                began = time.monotonic()
                statuses[await ask(connection, data)] += 1
                if time.monotonic() - began > SUSPICIOUS_S:
                    suspicious.append((name, data))

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


async def ask(client: httpx.AsyncClient, data: bytes) -> int:
    """The status of the answer, 0 if none came."""
    try:
        answer = await client.post("/predict?top_k=1", content=data, headers={"Content-Type": "image/jpeg"})
    except httpx.TransportError:
        return 0
    return answer.status_code


async def cpu_of(server: Server, data: bytes) -> float:
    """Seconds of CPU time that all processes of the server take for one file alone."""
    async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as client:
        before = server.cpu_s()
        await ask(client, data)
        return server.cpu_s() - before
