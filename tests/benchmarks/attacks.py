"""What slow, stalled and deaf clients cost the others: latency with and without them, alternated.

    python -m tests.benchmarks.attacks [--rounds 3] [--seconds 10]

The attackers call from 127.0.0.1 and the others from 127.0.0.2, so Linux only. It prints a table of medians over the
rounds, in ms, and what the others were answered while attacked.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import io
import multiprocessing
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from camcal.service.settings import DEFAULT_BUNDLE
from tests.soak.server import serving

HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n"
CLIENTS = 2
DRIP_S = 0.5
START_S = 3.0  # for the attackers to be at work

Attack = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def slow_head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"GET /health/live HTTP/1.1\r\nHost: x\r\nX-")
    await drip(writer)


async def slow_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD % 1_000_000 + bytes(100_000))
    await drip(writer)


async def half_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD % 19_900_000)
    for _ in range(180):
        writer.write(bytes(100_000))
        await writer.drain()
    await reader.read(1)


async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Asks for much, then on and on, and reads no answer."""
    question = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    writer.write(question * 20)
    while True:
        await writer.drain()
        await asyncio.sleep(DRIP_S)
        writer.write(question)


async def drip(writer: asyncio.StreamWriter) -> None:
    while True:
        await asyncio.sleep(DRIP_S)
        writer.write(b"x")
        await writer.drain()


ATTACKS: dict[str, tuple[int, Attack]] = {
    "200 slow heads": (200, slow_head),
    "200 slow bodies": (200, slow_body),
    "40 that never read": (40, deaf),
    "13 bodies that stop": (13, half_body),
}


async def attack(port: int, kind: Attack) -> None:
    """One attacker, who connects again when the server has had enough of it."""
    while True:
        with suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**12)
            if kind is deaf:
                writer.transport.pause_reading()  # type: ignore[attr-defined]  # of a socket
            try:
                await kind(reader, writer)
            finally:
                writer.close()
        await asyncio.sleep(DRIP_S)


async def attack_all(port: int, name: str) -> None:
    count, kind = ATTACKS[name]
    await asyncio.gather(*(attack(port, kind) for _ in range(count)))


def run_attack(port: int, name: str) -> None:
    asyncio.run(attack_all(port, name))


@contextmanager
def attacked(port: int, name: str) -> Iterator[None]:
    attackers = multiprocessing.get_context("spawn").Process(target=run_attack, args=(port, name))
    attackers.start()
    try:
        time.sleep(START_S)
        yield
    finally:
        attackers.terminate()
        attackers.join()


def ask(port: int, image: bytes, seconds: float) -> list[tuple[int, float]]:
    """Status and seconds of one request after another."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30, source_address=("127.0.0.2", 0))
    answers, end = [], time.monotonic() + seconds
    while (started := time.monotonic()) < end:
        connection.request("POST", "/predict?cam=false", image, {"Content-Type": "image/jpeg"})
        with connection.getresponse() as response:
            response.read()
        answers.append((response.status, time.monotonic() - started))
    connection.close()
    return answers


def measure(port: int, image: bytes, seconds: float) -> tuple[float, float, Counter[int]]:
    """p50 and p99 in ms, and how many answers of each status there were."""
    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = sum(clients.map(lambda _: ask(port, image, seconds), range(CLIENTS)), list[tuple[int, float]]())
    times = [taken * 1000 for _, taken in answers]
    p50, p99 = np.percentile(times, [50, 99])
    return float(p50), float(p99), Counter(status for status, _ in answers)


def photograph() -> bytes:
    """A JPEG of 500×375 with the bytes of a photograph."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC), np.float32)
    noisy = (smooth + rng.normal(0, 14, smooth.shape)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    image = photograph()
    with TemporaryDirectory() as folder, serving(DEFAULT_BUNDLE, Path(folder) / "log") as server:
        port = server.port
        measure(port, image, 2)
        print("| attack | p50 | attacked | p99 | attacked | ratio of p99 | answers |\n|---|---|---|---|---|---|---|")
        for name in ATTACKS:
            quiet, loud, statuses = [], [], Counter[int]()
            for _ in range(arguments.rounds):
                quiet.append(measure(port, image, arguments.seconds)[:2])
                with attacked(port, name):
                    *times, answered = measure(port, image, arguments.seconds)
                loud.append(times)
                statuses += answered
            p50, p99 = (statistics.median(column) for column in zip(*quiet, strict=True))
            p50_loud, p99_loud = (statistics.median(column) for column in zip(*loud, strict=True))
            answers = ", ".join(f"{count} × {status}" for status, count in sorted(statuses.items()))
            row = f"{p50:.0f} | {p50_loud:.0f} | {p99:.0f} | {p99_loud:.0f} | {p99_loud / p99:.2f}"
            print(f"| {name} | {row} | {answers} |", flush=True)


if __name__ == "__main__":
    main()
