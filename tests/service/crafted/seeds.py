"""A small sound picture of every accepted kind, as a start for mutations."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from tests.service.crafted.png import ADAM7, SIGNATURE, chunk

SIDE = 24  # px


def image(mode: str) -> Image.Image:
    small = np.random.default_rng(1).integers(0, 256, (5, 5, 4), dtype=np.uint8)
    whole = Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return whole if mode == "RGBA" else whole.convert("RGB").convert(mode)


def encoded(mode: str, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image(mode).save(buffer, format, **options)
    return buffer.getvalue()


def with_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("RGB", "JPEG", exif=exif, comment=b"comment")


def png(colour: int, samples: np.ndarray[Any, np.dtype[Any]], interlaced: bool = False) -> bytes:
    """A PNG that Pillow cannot write: of 16 bits a sample (big-endian `samples`), or interlaced. H×W×channels."""
    height, width = samples.shape[:2]
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    parts = [samples[y::step_y, x::step_x] for x, y, step_x, step_y in passes]
    raw = b"".join(b"\0" + line.tobytes() for part in parts if part.shape[1] for line in part)
    head = struct.pack(">IIBBBBB", width, height, samples.itemsize * 8, colour, 0, 0, int(interlaced))
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND")
    return SIGNATURE + body


def deep(colour: int, mode: str) -> bytes:
    # Times 257, both bytes of a sample are the same.
    return png(colour, np.asarray(image(mode)).reshape(SIDE, SIDE, -1).astype(">u2") * np.array(257, ">u2"))


def interlaced() -> bytes:
    return png(2, np.asarray(image("RGB")), interlaced=True)


def animated(format: str) -> bytes:
    frames = [image("RGB").rotate(90 * turn) for turn in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:], duration=100)
    return buffer.getvalue()


SEEDS: dict[str, Callable[[], bytes]] = {
    "baseline.jpg": partial(encoded, "RGB", "JPEG"),
    "subsampled.jpg": partial(encoded, "RGB", "JPEG", subsampling=2, restart_marker_blocks=2),
    "progressive.jpg": partial(encoded, "RGB", "JPEG", progressive=True),
    "grey.jpg": partial(encoded, "L", "JPEG"),
    "cmyk.jpg": partial(encoded, "CMYK", "JPEG"),
    "exif.jpg": with_exif,
    "one-bit.png": partial(encoded, "1", "PNG"),
    "grey.png": partial(encoded, "L", "PNG"),
    "grey-alpha.png": partial(encoded, "LA", "PNG"),
    "rgb.png": partial(encoded, "RGB", "PNG"),
    "rgba.png": partial(encoded, "RGBA", "PNG"),
    "palette.png": partial(encoded, "P", "PNG"),
    "palette-transparent.png": partial(encoded, "P", "PNG", transparency=b"\0\x80\xff"),
    "rgb-transparent.png": partial(encoded, "RGB", "PNG", transparency=(1, 2, 3)),
    "grey16.png": partial(deep, 0, "L"),
    "rgb16.png": partial(deep, 2, "RGB"),
    "rgba16.png": partial(deep, 6, "RGBA"),
    "interlaced.png": interlaced,
    "animated.png": partial(animated, "PNG"),
    "lossy.webp": partial(encoded, "RGB", "WEBP"),
    "lossy-alpha.webp": partial(encoded, "RGBA", "WEBP"),
    "lossless.webp": partial(encoded, "RGBA", "WEBP", lossless=True),
    "animated.webp": partial(animated, "WEBP"),
    "plain.gif": partial(encoded, "P", "GIF"),
    "transparent.gif": partial(encoded, "P", "GIF", transparency=3),
    "animated.gif": partial(animated, "GIF"),
    "one-bit.bmp": partial(encoded, "1", "BMP"),
    "palette.bmp": partial(encoded, "P", "BMP"),
    "rgb.bmp": partial(encoded, "RGB", "BMP"),
    "rgba.bmp": partial(encoded, "RGBA", "BMP"),
}
