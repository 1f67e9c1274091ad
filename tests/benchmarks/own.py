"""What camcal's own code saves where a library does the same: python -m tests.benchmarks.own COMMAND

The commands are multipart, png, augment and workers. Each pair does the same work in the same process, or behind the
same load, by turns; medians and their ratio are printed.
`multipart` needs python-multipart, which camcal does without: pip install --target FOLDER python-multipart, and
PYTHONPATH=FOLDER.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Annotated

import httpx
import numpy as np
import torch
import typer
from PIL import Image
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartParser
from torchvision.transforms import InterpolationMode, v2

from camcal.service.heatmaps.png import encode_png
from camcal.service.http.multipart import parse_form
from camcal.training.data.augment import Augment
from camcal.training.recipe import AugmentConfig
from tests.benchmarks.serving.photos import write_photos

app = typer.Typer(add_completion=False)

Rounds = Annotated[int, typer.Option(help="How often each takes its turn.")]


def by_turns(what: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> None:
    """Print the medians of both in milliseconds, and how many times as long the library takes."""
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    ours(), theirs()  # warm
    for _ in range(rounds):
        for name, work in (("ours", ours), ("theirs", theirs)):
            began = time.perf_counter()
            work()
            times[name].append(1000 * (time.perf_counter() - began))
    own, other = (statistics.median(times[name]) for name in ("ours", "theirs"))
    print(f"{what}: ours {own:.3f} ms, library {other:.3f} ms, ratio {other / own:.2f}")


@app.command()
def multipart(rounds: Rounds = 50) -> None:
    """A form with one photograph: our parser against starlette's with python-multipart."""
    for size in (57_000, 12_000_000):
        _parse(size, rounds)


def _parse(size: int, rounds: int) -> None:
    boundary = "-" * 24 + "camcal"
    photo = np.random.default_rng(0).bytes(size)
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
    body = head.encode() + photo + f"\r\n--{boundary}--\r\n".encode()
    content_type = f"multipart/form-data; boundary={boundary}"
    chunks = [body[start : start + 65_536] for start in range(0, len(body), 65_536)]

    async def stream() -> AsyncGenerator[bytes, None]:
        for chunk in chunks:
            yield chunk

    async def theirs() -> bytes:
        form = await MultiPartParser(Headers({"content-type": content_type}), stream()).parse()
        upload = form["image"]
        assert not isinstance(upload, str)
        return await upload.read()

    def ours() -> bytes:
        whole = bytearray()
        for chunk in chunks:
            whole += chunk
        return bytes(parse_form(content_type, whole, 16)[0].data)

    assert ours() == asyncio.run(theirs()) == photo
    with asyncio.Runner() as runner:
        by_turns(f"form of {size / 1000:.0f} kB", ours, lambda: runner.run(theirs()), rounds)


@app.command()
def png(rounds: Rounds = 50) -> None:
    """A photograph as PNG: ours against Pillow's."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Image.open(write_photos(Path(folder), count=1)[0]).convert("RGB").resize((512, 512))

    def pillow(level: int) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, "png", compress_level=level)
        return buffer.getvalue()

    for level in (1, 6):
        sizes = len(encode_png(picture)), len(pillow(level))
        by_turns(
            f"PNG of 512², Pillow's level {level} ({sizes[0] / 1000:.0f} and {sizes[1] / 1000:.0f} kB)",
            lambda: encode_png(picture),
            lambda level=level: pillow(level),  # type: ignore[misc]
            rounds,
        )


@app.command()
def augment(rounds: Rounds = 20) -> None:
    """64 photographs at 112 px, cropped, flipped, rotated and erased: ours as a batch against torchvision v2."""
    images = torch.randint(0, 256, (64, 112, 112, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    config = AugmentConfig(flip=True, area=(0.35, 1.0), aspect=(0.67, 1.5), rotate=25, erase=0.3)
    own = Augment(config, torch.Generator().manual_seed(0))
    each = v2.Compose(
        [
            v2.RandomRotation(25, InterpolationMode.BILINEAR),
            v2.RandomResizedCrop(112, (0.35, 1.0), (0.67, 1.5), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32),
            v2.RandomErasing(0.3),
        ]
    )
    pictures = images.permute(0, 3, 1, 2)
    by_turns(
        "augmentation of 64 images at 112 px",
        lambda: own(images),
        lambda: torch.stack([each(picture) for picture in pictures]),
        rounds,
    )


@app.command()
def workers(rounds: Rounds = 3, seconds: float = 5.0, clients: int = 16) -> None:
    """Two workers: our supervisor against uvicorn's own, with the same app. Photographs of 57 kB, closed loop."""
    rates: dict[str, list[float]] = {"ours": [], "uvicorn": []}
    with tempfile.TemporaryDirectory() as folder:
        photos = [path.read_bytes() for path in write_photos(Path(folder), count=24)]
        for _ in range(rounds):
            for name, command in (("ours", _ours), ("uvicorn", _uvicorn)):
                with _serving(command) as url:
                    asyncio.run(_load(url, photos, 1.0, clients))
                    rates[name].append(asyncio.run(_load(url, photos, seconds, clients)))
    own, other = (statistics.median(rates[name]) for name in ("ours", "uvicorn"))
    print(
        f"two workers, {clients} clients: ours {own:.0f}/s, uvicorn's {other:.0f}/s, ratio {own / other:.2f}; {rates}"
    )


def _ours(port: int) -> list[str]:
    return [sys.executable, "-m", "camcal", "serve", "--workers", "2", "--port", str(port)]


def _uvicorn(port: int) -> list[str]:
    options = ["--factory", "--workers", "2", "--port", str(port), "--log-level", "warning", "--no-access-log"]
    return [sys.executable, "-m", "uvicorn", "camcal:create_app", *options]


@contextlib.contextmanager
def _serving(command: Callable[[int], list[str]]) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    # What our workers divide by themselves.
    shares = {} if command is _ours else {"CAMCAL_INTRA_THREADS": threads, "CAMCAL_DECODE_THREADS": threads}
    with subprocess.Popen(command(port), env={**os.environ, **shares}, stderr=subprocess.DEVNULL) as server:
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(600):
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health/ready").status_code == 200:
                        break
                time.sleep(0.1)
            time.sleep(2)  # uvicorn's second worker
            yield url
        finally:
            server.terminate()


async def _load(url: str, photos: list[bytes], seconds: float, clients: int) -> float:
    answered, end = 0, time.monotonic() + seconds

    async def ask(start: int) -> None:
        nonlocal answered
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            place = start
            while time.monotonic() < end:
                content = photos[place % len(photos)]
                response = await client.post("/predict", content=content, headers={"Content-Type": "image/jpeg"})
                answered += response.status_code == 200
                place += 1

    await asyncio.gather(*(ask(start) for start in range(clients)))
    return answered / seconds


if __name__ == "__main__":
    app()
