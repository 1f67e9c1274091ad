"""From the bytes of an image file to the pixels a network sees. Every fault of the bytes is one of three errors."""

from __future__ import annotations

import io
import math
import sys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from camcal.models.headers import (
    Data,
    Header,
    ImageTooLargeError,
    UndecodableImageError,
    UnsupportedFormatError,
    read_header,
)
from camcal.models.pictures import Picture, UnusualJpegError, read_picture
from camcal.models.preprocessing import Preprocessing
from camcal.service.engine.cost import Cost, cost

__all__ = [
    "Data",
    "Decoded",
    "ImageTooLargeError",
    "LargeImageError",
    "Limits",
    "UndecodableImageError",
    "UnsupportedFormatError",
    "decode",
]

PICTURE_SIDE = 512  # longest side of the picture kept beside a heatmap, in px
AS_IT_CAME_SIDE = 640  # a JPEG file up to this size, in px
AS_IT_CAME_BYTES = 128 * 1024  # and this one is kept as the picture itself, which costs no time

# A JPEG is decoded at 1/2, 1/4 or 1/8 if that leaves so many pixels for each that the network sees. At 2, the best
# class stayed the same for all but the share of photographs that docs/explanation/serving.md gives.
OVERSAMPLING = 2

# CPU time of an image that is decoded in a thread, beside others. A JPEG of one scan may take longer: its time grows
# with the bytes that the client had to send, while a few kilobytes of the other formats can hold many megapixels.
ORDINARY_S, ORDINARY_JPEG_S = 0.04, 0.1
ORDINARY_BYTES = 48 * 2**20  # memory of such an image, at most


class LargeImageError(ValueError):
    """Decoding this image takes too long, or too much memory, for a thread beside others."""

    def __init__(self, data: Data, expected: Cost):
        super().__init__(f"decoding takes about {expected.cpu_s:.2g} s and {expected.nbytes} bytes")
        self.data = data
        self.expected = expected


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is decoded: the largest file in bytes, the largest picture in pixels, memory in bytes and CPU time."""

    max_bytes: int
    max_pixels: int
    large_bytes: int = sys.maxsize
    decode_cpu_s: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A picture ready for the network."""

    pixels: NDArray[np.uint8]  # input_size × input_size × 3, RGB
    width: int  # of the upright picture, px
    height: int
    picture: bytes  # the part that the network sees, in its true shape, as a JPEG; empty when not asked for
    picture_size: tuple[int, int]  # its width and height, px


def decode(
    data: Data,
    preprocessing: Preprocessing,
    limits: Limits,
    *,
    picture: bool = True,
    ordinary_bytes: int | None = None,
) -> Decoded:
    """Decode one image file: the first frame, upright, on white, sRGB; then resize and crop.

    Args:
        data: the file.
        preprocessing: the network's rule.
        limits: checked from the file's header, before any pixel is decoded.
        picture: whether to keep a small JPEG of what the network sees.
        ordinary_bytes: decode an ordinary image only, in this much memory; by default any image within the limits.

    Raises:
        UnsupportedFormatError: if the bytes begin like none of the accepted formats.
        ImageTooLargeError: if the file, the picture, or the memory or time to decode it exceeds `limits`.
        UndecodableImageError: if the bytes are damaged, truncated or empty.
        LargeImageError: if the image is not ordinary, where only such are wanted.
    """
    if len(data) > limits.max_bytes:
        raise ImageTooLargeError(f"the image has {len(data)} bytes; the limit is {limits.max_bytes} (CAMCAL_MAX_BYTES)")
    header = read_header(data)
    shrink = shrink_of(header, preprocessing, picture)
    expected = cost(header, len(data), shrink)
    _check(header, expected, limits)
    if ordinary_bytes is not None and not _is_ordinary(header, expected, ordinary_bytes):
        raise LargeImageError(data, expected)
    try:
        read = read_picture(data, header, shrink, patient=ordinary_bytes is None)
    except UnusualJpegError:
        raise LargeImageError(data, expected) from None
    width, height = _upright_size(header, read)
    kept, size = b"", (0, 0)
    if picture:
        kept, size = _as_it_came(data, header, read, preprocessing) or _picture(read, preprocessing)
    return Decoded(pixels=read.pixels(preprocessing), width=width, height=height, picture=kept, picture_size=size)


def _check(header: Header, expected: Cost, limits: Limits) -> None:
    image = f"the image is {header.width}×{header.height} px"
    if header.pixels > limits.max_pixels:
        raise ImageTooLargeError(f"{image}; the limit is {limits.max_pixels / 1e6:g} Mpx (CAMCAL_MAX_PIXELS)")
    if expected.nbytes > limits.large_bytes:
        needed, allowed = (f"{nbytes / 2**20:.0f} MiB" for nbytes in (expected.nbytes, limits.large_bytes))
        raise ImageTooLargeError(
            f"{image}: decoding a {header.format} of this size takes {needed} of memory; the limit is {allowed} "
            "(CAMCAL_LARGE_BYTES)"
        )
    if expected.cpu_s > limits.decode_cpu_s:
        scans = f" in {header.scans} scans" if header.scans > 1 else ""
        raise ImageTooLargeError(
            f"{image}{scans}: decoding it takes about {expected.cpu_s:.1f} s; the limit is {limits.decode_cpu_s:g} s "
            "(CAMCAL_DECODE_CPU_S)"
        )


def _is_ordinary(header: Header, expected: Cost, ordinary_bytes: int) -> bool:
    sequential = header.format == "JPEG" and not header.progressive
    longest_s = ORDINARY_JPEG_S if sequential else ORDINARY_S
    return not header.odd and expected.cpu_s <= longest_s and expected.nbytes <= min(ordinary_bytes, ORDINARY_BYTES)


def shrink_of(header: Header, preprocessing: Preprocessing, picture: bool) -> int:
    """The largest of 1, 2, 4, 8 by which a JPEG may be shrunk without harm to the network's input or the picture."""
    if header.format != "JPEG":
        return 1
    left, top, right, bottom = preprocessing.box(header.width, header.height)
    sides = right - left, bottom - top
    room = min(sides) / (OVERSAMPLING * preprocessing.input_size)
    if picture:
        room = min(room, max(sides) / PICTURE_SIDE)
    return next((factor for factor in (8, 4, 2) if room >= factor), 1)


def _upright_size(header: Header, read: Picture) -> tuple[int, int]:
    # A JPEG's picture may be smaller than its file says; another's EXIF block is known only when it is decoded.
    return header.upright if header.format == "JPEG" else read.rgb.size


def _as_it_came(
    data: Data, header: Header, read: Picture, preprocessing: Preprocessing
) -> tuple[bytes, tuple[int, int]] | None:
    """A small JPEG itself, where it shows what the network sees."""
    size = read.rgb.size
    small = max(size) <= AS_IT_CAME_SIDE and len(data) <= AS_IT_CAME_BYTES
    whole = preprocessing.box(*size) == (0, 0, *size)
    as_it_came = header.format == "JPEG" and size == (header.width, header.height) and not header.odd
    return (bytes(data), size) if small and whole and as_it_came and not read.altered else None


def _picture(read: Picture, preprocessing: Preprocessing) -> tuple[bytes, tuple[int, int]]:
    """A JPEG of what the network sees, in its true shape, with the longest side at most `PICTURE_SIDE`."""
    left, top, right, bottom = preprocessing.box(*read.rgb.size)
    shrink = min(1.0, PICTURE_SIDE / max(right - left, bottom - top))
    small = read.resized(
        (max(1, round((right - left) * shrink)), max(1, round((bottom - top) * shrink))),
        (left, top, right, bottom),
        reducing_gap=2.0,
    )
    small.info.clear()  # Pillow would write the comment, or refuse one of more than 64 kB
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue(), small.size
