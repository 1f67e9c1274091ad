"""Decode an image file to the pixels of the network's input. Any invalid file raises one of three errors."""

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

PICTURE_SIDE = 512  # longest side of the picture that is stored with a heatmap, in px
UNCHANGED_SIDE = 640  # a JPEG file is stored unchanged, which costs no time, up to this longest side in px
UNCHANGED_BYTES = 128 * 1024  # and up to this file size

# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that still leaves this factor to the input size of the network.
# docs/explanation/serving.md gives the share of photographs whose top class changes with a factor of 2.
OVERSAMPLING = 2

# Maximum CPU time of an ordinary image, which is decoded in a thread of the worker. A JPEG with one scan may take more:
# its time grows with its file size. A few kilobytes of the other formats can contain many megapixels.
ORDINARY_S, ORDINARY_JPEG_S = 0.04, 0.1
ORDINARY_BYTES = 48 * 2**20  # maximum memory to decode an ordinary image


class LargeImageError(ValueError):
    """The image takes too much time or memory to be decoded in a thread of the worker."""

    def __init__(self, data: Data, expected: Cost):
        super().__init__(f"decoding takes about {expected.cpu_s:.2g} s and {expected.nbytes} bytes")
        self.data = data
        self.expected = expected


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on images: file size, pixels, and the memory (bytes) and CPU time (seconds) to decode them."""

    max_bytes: int
    max_pixels: int
    large_bytes: int = sys.maxsize
    decode_cpu_s: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A decoded image."""

    pixels: NDArray[np.uint8]  # input_size × input_size × 3, RGB
    width: int  # of the upright image, px
    height: int
    picture: bytes  # JPEG of the part of the image that the network sees, not stretched; empty if not requested
    picture_size: tuple[int, int]  # width and height of `picture`, px


def decode(
    data: Data,
    preprocessing: Preprocessing,
    limits: Limits,
    *,
    picture: bool = True,
    ordinary_bytes: int | None = None,
) -> Decoded:
    """Decode one image file: the first frame, upright, on a white background, in sRGB; then resize and crop it,
    or fill it up to a square.

    Args:
        data: the file.
        preprocessing: the resize and crop rule of the network.
        limits: checked against the file's header, before any pixel is decoded.
        picture: whether to return a small JPEG of the part that the network sees.
        ordinary_bytes: decode ordinary images only, with this much memory; by default any image within `limits`.

    Raises:
        UnsupportedFormatError: if the file is in none of the accepted formats.
        ImageTooLargeError: if the file size, pixels, memory or time exceeds `limits`.
        UndecodableImageError: if the file is damaged, truncated or empty.
        LargeImageError: if the image is not ordinary and `ordinary_bytes` is set.
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
    jpeg, size = b"", (0, 0)
    if picture:
        jpeg, size = _unchanged(data, header, read, preprocessing) or _picture(read, preprocessing)
    pixels = read.pixels(preprocessing, (width, height))
    return Decoded(pixels=pixels, width=width, height=height, picture=jpeg, picture_size=size)


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
    """The largest of the factors 1, 2, 4, 8 that still leaves enough pixels for the network's input and the picture."""
    if header.format != "JPEG":
        return 1
    left, top, right, bottom = preprocessing.box(header.width, header.height)
    sides = right - left, bottom - top
    inner = preprocessing.place(header.width, header.height)
    room = min(sides[0] / (inner[2] - inner[0]), sides[1] / (inner[3] - inner[1])) / OVERSAMPLING
    if picture:
        room = min(room, max(sides) / PICTURE_SIDE)
    return next((factor for factor in (8, 4, 2) if room >= factor), 1)


def _upright_size(header: Header, read: Picture) -> tuple[int, int]:
    # A JPEG may have been decoded at a reduced size. The EXIF orientation of other formats is known after decoding.
    return header.upright if header.format == "JPEG" else read.rgb.size


def _unchanged(
    data: Data, header: Header, read: Picture, preprocessing: Preprocessing
) -> tuple[bytes, tuple[int, int]] | None:
    """The file itself, if it is a small JPEG and the network sees all of it."""
    size = read.rgb.size
    small = max(size) <= UNCHANGED_SIDE and len(data) <= UNCHANGED_BYTES
    whole = preprocessing.box(*size) == (0, 0, *size)
    plain = header.format == "JPEG" and size == (header.width, header.height) and not header.odd
    return (bytes(data), size) if small and whole and plain and not read.altered else None


def _picture(read: Picture, preprocessing: Preprocessing) -> tuple[bytes, tuple[int, int]]:
    """A JPEG of the part that the network sees, not stretched, with the longest side at most `PICTURE_SIDE`."""
    left, top, right, bottom = preprocessing.box(*read.rgb.size)
    shrink = min(1.0, PICTURE_SIDE / max(right - left, bottom - top))
    small = read.resized(
        (max(1, round((right - left) * shrink)), max(1, round((bottom - top) * shrink))),
        (left, top, right, bottom),
        reducing_gap=2.0,
    )
    small.info.clear()  # Pillow would write the image's comment, or fail if it exceeds 64 kB
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue(), small.size
