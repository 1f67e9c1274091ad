"""How long one core takes to draw a heatmap: `PYTHONPATH=. python tests/benchmarks/rendering.py PHOTO`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from camcal.models.preprocessing import Preprocessing
from camcal.service.engine.decoding import Limits, decode
from camcal.service.heatmaps.heatmap import PictureFormat, View, positive_scale, render
from camcal.service.heatmaps.legend import Caption

SIZE = 512  # px
FORMATS: tuple[PictureFormat, ...] = ("png", "webp", "jpeg")


def cpu_ms(work: Callable[[], bytes], repeats: int = 20, rounds: int = 5) -> float:
    """CPU time of one call, ms: the least of some rounds."""
    work()
    times = []
    for _ in range(rounds):
        started = time.process_time()
        for _ in range(repeats):
            work()
        times.append((time.process_time() - started) / repeats)
    return 1000 * min(times)


def main(photo: Path) -> None:
    rule = Preprocessing(fit="stretch", resize=112, input_size=112, mean=(0, 0, 0), std=(1, 1, 1))
    image = decode(photo.read_bytes(), rule, Limits(max_bytes=10**8, max_pixels=10**8))
    contributions = np.random.default_rng(0).normal(size=(7, 7)).astype(np.float32)
    scale = positive_scale(contributions)
    caption = Caption(title="a class", detail="calibrated score 12.34")
    print(f"{photo.name}, {image.width}×{image.height} px, drawn with the longest side {SIZE} px, ms of CPU")
    print("| format | overlay | overlay with legend | map alone |\n|---|---|---|---|")
    for format in FORMATS:
        columns = []
        for on_picture, words in ((True, None), (True, caption), (False, None)):
            view = View(size=SIZE, overlay=on_picture, format=format)
            draw = partial(render, contributions, scale, image.picture, image.picture_size, view, words)
            columns.append(f"{cpu_ms(draw):.1f}")
        print(f"| {format} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
