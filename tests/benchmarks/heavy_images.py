"""What images that are hard to decode cost the others, and how much memory they take.

    python -m tests.benchmarks.heavy_images latency [--seconds 8] [--rounds 3] [--checkout FOLDER]
    python -m tests.benchmarks.heavy_images memory [--seconds 8]

`latency` sends each image in a loop over four connections and measures the requests of two other clients, with and
without, in turns. Its first row is what four more connections with ordinary photographs do. `--checkout` measures the
service of another checkout of camcal. `memory` sends the largest images of every format over 32 connections at once and
prints the highest sum of all processes' PSS. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from PIL import Image

from camcal.service.settings import DEFAULT_BUNDLE
from tests.benchmarks.attacks import measure, photograph
from tests.benchmarks.serving.load import Load, Outcome
from tests.service.crafted import CASES
from tests.service.crafted.gif import frame, gif
from tests.service.crafted.png import RGBA, png
from tests.soak.server import Server, serving

ATTACKERS = 4
LARGEST_CONNECTIONS = 32
NAMES = ("rle8-line.bmp", "lossless.webp", "one-bit.png", "one-column.png", "many-scans.jpg", "fill-bytes.jpg")


def jpeg(side: int, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 20).convert("RGB").save(buffer, "JPEG", quality=40, **options)
    return buffer.getvalue()


def webp(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (side, side), (200, 100, 50, 128)).save(buffer, "WEBP", lossless=True, method=0)
    return buffer.getvalue()


LARGEST: dict[str, Callable[[], bytes]] = {  # just within the limits of pixels, memory and time
    "sequential.jpg": lambda: jpeg(7000),
    "progressive.jpg": lambda: jpeg(6500, progressive=True, subsampling=0),
    "rgba.png": lambda: png(6800, 6800, 8, RGBA),
    "transparent.webp": lambda: webp(4900),
    "palette.gif": lambda: gif(7071, 7071, frame(1, 1)),
    "one-bit.bmp": CASES["one-bit.bmp"],
}


async def loop(url: str, data: bytes, end: float) -> Counter[int]:
    """What one connection is answered that sends `data` again and again."""
    answers = Counter[int]()
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        while time.monotonic() < end:
            try:
                sent = await client.post("/predict", content=data, headers={"Content-Type": "image/png"})
                answers[sent.status_code] += 1
            except httpx.HTTPError:
                answers[0] += 1
    return answers


async def loops(url: str, images: list[bytes], seconds: float) -> Counter[int]:
    end = time.monotonic() + seconds
    return sum(await asyncio.gather(*(loop(url, data, end) for data in images)), Counter[int]())


@contextmanager
def attacked(port: int, data: bytes, seconds: float) -> Iterator[Counter[int]]:
    """With attackers for `seconds`, whose answers are counted when they have ended."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "image").write_bytes(data)
        load = Load(port=port, path="/predict", photos=Path(folder), clients=ATTACKERS, seconds=seconds)
        # A client that does little else than copy bytes: it shares the cores with the service.
        command = [sys.executable, "-m", "tests.benchmarks.serving.load"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            process.stdin.write(load.model_dump_json())
            process.stdin.close()
            counted = Counter[int]()
            time.sleep(2)  # for the attackers to be at work
            yield counted
            assert process.stdout is not None
            counted.update(status for _, _, status in Outcome.model_validate_json(process.stdout.read()).records)


def latency(seconds: float, rounds: int, checkout: Path) -> None:
    print("| image | p50, ms | attacked | p99, ms | attacked | ratio of p99 | other statuses | attackers |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    image = photograph()
    images = {"photograph.jpg": photograph} | {name: CASES[name] for name in NAMES}
    for name, build in images.items():
        quiet, loud, others, attackers = [], [], Counter[int](), Counter[int]()
        with (
            tempfile.TemporaryDirectory() as folder,
            serving(DEFAULT_BUNDLE, Path(folder) / "log", checkout) as server,
        ):
            port = server.port
            measure(port, image, 2)
            for _ in range(rounds):
                quiet.append(measure(port, image, seconds)[:2])
                with attacked(port, build(), seconds + 3) as counted:
                    *times, statuses = measure(port, image, seconds)
                loud.append(times)
                others += statuses
                attackers += counted
        p50, p99 = (statistics.median(column) for column in zip(*quiet, strict=True))
        p50_loud, p99_loud = (statistics.median(column) for column in zip(*loud, strict=True))
        bad = shown({status: count for status, count in others.items() if status != 200}) or "none"
        row = f"{p50:.0f} | {p50_loud:.0f} | {p99:.0f} | {p99_loud:.0f} | {p99_loud / p99:.2f}"
        print(f"| {name} | {row} | {bad} | {shown(attackers)} |", flush=True)


def memory(seconds: float) -> None:
    images = [build() for build in LARGEST.values()]
    print("| workers | quiet, MB | highest, MB | answers |\n|---|---|---|---|", flush=True)
    for workers in range(1, 5):
        with tempfile.TemporaryDirectory() as folder:
            with serving(DEFAULT_BUNDLE, Path(folder) / "log", CAMCAL_WORKERS=str(workers)) as server:
                quiet = server.usage().pss_mb
                highest: list[float] = []
                done = threading.Event()
                watch = threading.Thread(target=sample, args=(server, highest, done))
                watch.start()
                sent = (images * LARGEST_CONNECTIONS)[:LARGEST_CONNECTIONS]
                answers = asyncio.run(loops(server.url, sent, seconds))
                done.set()
                watch.join()
        print(f"| {workers} | {quiet:.0f} | {max(highest):.0f} | {shown(answers)} |", flush=True)


def sample(server: Server, highest: list[float], done: threading.Event) -> None:
    while not done.wait(0.03):
        highest.append(server.usage().pss_mb)


def shown(answers: dict[int, int]) -> str:
    return ", ".join(f"{count} × {status}" for status, count in sorted(answers.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["latency", "memory"])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkout", type=Path, default=Path.cwd())
    arguments = parser.parse_args()
    if arguments.what == "memory":
        memory(arguments.seconds)
    else:
        latency(arguments.seconds, arguments.rounds, arguments.checkout)


if __name__ == "__main__":
    main()
