"""What camcal's own code saves where a library does the same: python -m tests.benchmarks.own COMMAND

The commands are multipart, png, augment and workers. Each pair does the same work in the same process, or behind the
same load, by turns; medians and their ratio are printed.
`multipart` needs python-multipart, which camcal does without: pip install --target FOLDER python-multipart, and
PYTHONPATH=FOLDER.
"""

from __future__ import annotations

import asyncio
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartParser
from torchvision.transforms import InterpolationMode, v2

from camcal.service.heatmaps.png import encode_png
from camcal.service.http.multipart import parse_form
from camcal.service.settings import DEFAULT_BUNDLE
from camcal.training.data.augment import Augment
from camcal.training.recipe import AugmentConfig
from tests.benchmarks.serving.load import Load
from tests.benchmarks.serving.photos import write_photos
from tests.benchmarks.serving.rounds import SKIP_S, generate
from tests.benchmarks.serving.servers import CAMCAL, Server, running
from tests.benchmarks.serving.summary import closed_loop

app = typer.Typer(add_completion=False)

BIN = Path(sys.executable).parent
CPUS = len(os.sched_getaffinity(0))


def _uvicorn(bin_: Path, _: Path, port: int) -> list[str]:
    options = ["--factory", "--workers", str(CPUS), "--port", str(port), "--log-level", "warning", "--no-access-log"]
    return [str(bin_ / "python"), "-m", "uvicorn", "camcal:create_app", *options]


# One CPU for each worker, as our supervisor divides them.
UVICORN = Server(
    name="uvicorn", command=_uvicorn, environment={"CAMCAL_INTRA_THREADS": "1", "CAMCAL_DECODE_THREADS": "1"}
)

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
    """One worker per CPU: our supervisor against uvicorn's, with the same app and photographs, in a closed loop."""
    rates: dict[str, list[float]] = {server.name: [] for server in (CAMCAL, UVICORN)}
    with tempfile.TemporaryDirectory() as name:
        folder, photos = Path(name), Path(name) / "photos"
        first = write_photos(photos, count=24)[0].read_bytes()
        for _ in range(rounds):
            for server in (CAMCAL, UVICORN):
                with running(server, BIN, DEFAULT_BUNDLE, first, folder / "server.log") as up:
                    load = Load(port=up.port, path="/predict", photos=photos, clients=clients, seconds=seconds + SKIP_S)
                    figures = closed_loop(generate(load).records, SKIP_S, seconds)
                rates[server.name].append(figures["rate"])
    own, other = (statistics.median(values) for values in rates.values())
    print(f"{CPUS} workers, {clients} clients: ours {own:.0f}/s, uvicorn's {other:.0f}/s, ratio {own / other:.2f}")


if __name__ == "__main__":
    app()
