"""Does decoding at a reduced scale change what is predicted? On photographs enlarged to what cameras make.

    python -m tests.benchmarks.decoding_parity BUNDLE FOLDER [--count 300] [--megapixels 1 3 6 12]

Every photograph is enlarged to 1, 3, 6 and 12 megapixels, saved as a JPEG, and predicted twice: from a decoding at full
size, and as the service does it, with and without a picture for the heatmap. Prints for each size the share of equal
best classes, the largest change of a calibrated probability, and the milliseconds of both ways.
"""

from __future__ import annotations

import argparse
import io
import math
import random
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from camcal.models.bundle import Bundle
from camcal.service.engine import decoding
from camcal.service.engine.decoding import Limits, decode
from camcal.service.engine.session import Session

LIMITS = Limits(max_bytes=50_000_000, max_pixels=50_000_000)


def enlarged(photograph: Image.Image, megapixels: float) -> bytes:
    """The photograph with so many pixels, as a JPEG."""
    scale = math.sqrt(megapixels * 1e6 / (photograph.width * photograph.height))
    size = (round(photograph.width * scale), round(photograph.height * scale))
    buffer = io.BytesIO()
    photograph.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def full_size(data: bytes, session: Session) -> NDArray[np.uint8]:
    """What the network sees after a decoding of every pixel, as in training."""
    with Image.open(io.BytesIO(data)) as image:
        return session.bundle.manifest.preprocessing.apply(image.convert("RGB"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--megapixels", type=float, nargs="+", default=[1, 3, 6, 12])
    parser.add_argument("--oversampling", type=float, default=decoding.OVERSAMPLING)
    options = parser.parse_args()
    decoding.OVERSAMPLING = options.oversampling
    session = Session(Bundle.load(options.bundle), device="cpu", threads=1)
    preprocessing = session.bundle.manifest.preprocessing
    files = sorted(options.folder.rglob("*.jpg"))
    random.Random(0).shuffle(files)
    print("Mpx  picture  same top-1  max shift  full ms  reduced ms")
    for megapixels in options.megapixels:
        counts = {True: 0, False: 0}
        shifts, seconds = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0, None: 0.0}
        for file in files[: options.count]:
            with Image.open(file) as image:
                data = enlarged(image.convert("RGB"), megapixels)
            started = time.perf_counter()
            pixels = [full_size(data, session)]
            seconds[None] += time.perf_counter() - started
            for picture in (True, False):
                started = time.perf_counter()
                pixels.append(decode(data, preprocessing, LIMITS, picture=picture).pixels)
                seconds[picture] += time.perf_counter() - started
            shares = session.run(pixels, top_k=1).calibrated_probabilities
            for picture, found in zip((True, False), shares[1:], strict=True):
                counts[picture] += int(found.argmax() == shares[0].argmax())
                shifts[picture] = max(shifts[picture], float(np.abs(found - shares[0]).max()))
        n = min(options.count, len(files))
        for picture in (True, False):
            print(
                f"{megapixels:3g}  {'yes' if picture else 'no':7}  {counts[picture] / n:10.2%}  {shifts[picture]:9.4f}"
                f"  {1000 * seconds[None] / n:7.1f}  {1000 * seconds[picture] / n:10.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
