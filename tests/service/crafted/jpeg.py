"""JPEG files: scans and segments without end, headers that lie, the rarer kinds of coding."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image

from tests.service.crafted import tiff

LONG = 19_000_000  # bytes, just under the largest file that is accepted
START, END = b"\xff\xd8", b"\xff\xd9"
SOF0, SOF2, SOF3, SOF9, SOF10, DHT, SOS, DQT, DRI = 0xC0, 0xC2, 0xC3, 0xC9, 0xCA, 0xC4, 0xDA, 0xDB, 0xDD
APP0, APP1, APP2, APP13, APP14, COM = 0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE
EXIF, ICC = b"Exif\0\0", b"ICC_PROFILE\0"


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", 2 + len(data)) + data


@cache
def plain(mode: str = "RGB", side: int = 64, progressive: bool = False) -> bytes:
    """Noise as Pillow writes it."""
    bands = {"L": 1, "RGB": 3, "CMYK": 4}[mode]
    noise = np.random.default_rng(0).integers(0, 256, (side, side, bands), dtype=np.uint8)
    image = Image.frombytes(mode, (side, side), noise.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", progressive=progressive)
    return buffer.getvalue()


def with_segments(*segments: bytes, base: bytes | None = None) -> bytes:
    """A JPEG with these segments before its own."""
    base = plain() if base is None else base
    return START + b"".join(segments) + base[2:]


def in_scan(data: bytes) -> bytes:
    """A JPEG with `data` at the end of its only scan."""
    return plain()[:-2] + data + END


def recoded(marker: int, base: bytes | None = None) -> bytes:
    """A JPEG whose frame says that it is of another kind."""
    base = plain() if base is None else base
    at = frame_at(base)
    return base[: at + 1] + bytes([marker]) + base[at + 2 :]


def frame_at(data: bytes) -> int:
    """Where the frame's header begins."""
    return max(data.find(b"\xff\xc0\0"), data.find(b"\xff\xc2\0"))


def resized(width: int, height: int, base: bytes | None = None) -> bytes:
    """A JPEG whose frame says that it has another size."""
    base = plain() if base is None else base
    at = frame_at(base) + 5
    return base[:at] + struct.pack(">HH", height, width) + base[at + 4 :]


def frame_with(place: int, value: int) -> bytes:
    """A JPEG with one byte of its frame's header, counted from its marker, replaced."""
    at = frame_at(plain()) + place
    return plain()[:at] + bytes([value]) + plain()[at + 1 :]


def many_scans(count: int, base: bytes) -> bytes:
    scan = base.rindex(bytes([0xFF, SOS]))
    return base[:-2] + base[scan:-2] * count + END


@cache
def grey(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (side, side), 128).save(buffer, "JPEG", progressive=True, quality=50)
    return buffer.getvalue()


def split(marker: int, head: bytes, data: bytes, numbered: bool = False) -> bytes:
    """`data` over as many segments as it takes, each with `head`."""
    room = 65_533 - len(head) - 2
    parts = [data[at : at + room] for at in range(0, len(data), room)]
    counts = [bytes([n % 256, len(parts) % 256]) if numbered else b"" for n in range(1, len(parts) + 1)]
    return b"".join(segment(marker, head + count + part) for count, part in zip(counts, parts, strict=True))


def resources() -> bytes:
    """A Photoshop segment full of empty resources."""
    return segment(APP13, b"Photoshop 3.0\0" + b"8BIM\x03\xf3\0\0\0\0\0\0" * 5_000)


CASES: dict[str, Callable[[], bytes]] = {
    # Scans.
    "many-scans.jpg": lambda: many_scans(900, grey(1260)),
    "many-scans-of-a-large-picture.jpg": lambda: many_scans(60, grey(7000)),
    "many-colour-scans.jpg": lambda: many_scans(900, plain(progressive=True)),
    "arithmetic-scans.jpg": lambda: recoded(SOF10, many_scans(900, grey(1260))),
    "restart-markers.jpg": lambda: in_scan(b"\xff\xd0" * (LONG // 2)),
    "every-restart-marker.jpg": lambda: in_scan(bytes(b for n in range(8) for b in (0xFF, 0xD0 + n)) * (LONG // 16)),
    "restart-after-each-block.jpg": lambda: with_segments(segment(DRI, b"\0\1"), base=resized(7000, 7000)),
    "fill-bytes-in-scan.jpg": lambda: in_scan(b"\xff" * LONG),
    "zeros-in-scan.jpg": lambda: in_scan(bytes(LONG)),
    # Segments.
    "fill-bytes.jpg": lambda: with_segments(b"\xff" * LONG),
    "fill-bytes-late.jpg": lambda: with_segments(segment(COM, b"x"), b"\xff" * LONG),
    "rubbish-between.jpg": lambda: with_segments(segment(COM, b"x") + bytes(LONG)),
    "comments.jpg": lambda: with_segments(segment(COM, bytes(65_533)) * (LONG // 65_537)),
    "tiny-comments.jpg": lambda: with_segments(segment(COM, b"") * (LONG // 4)),
    "comments-within-limits.jpg": lambda: with_segments(segment(COM, bytes(9_000)) * 1_900),
    "starts.jpg": lambda: with_segments(START * (LONG // 2)),
    "huffman-tables.jpg": lambda: with_segments(plain()[(at := plain().find(b"\xff\xc4")) : at + 33] * (LONG // 33)),
    "resources.jpg": lambda: with_segments(resources() * (LONG // 60_018)),
    "profile-parts.jpg": lambda: with_segments(split(APP2, ICC, bytes(16_000_000), numbered=True)),
    "profile-parts-missing.jpg": lambda: with_segments(segment(APP2, ICC + b"\2\xff" + bytes(100))),
    "exif-entries.jpg": lambda: with_segments(split(APP1, EXIF, tiff.many_entries(LONG))),
    "exif-entries-in-one.jpg": lambda: with_segments(segment(APP1, EXIF + tiff.many_entries(65_000, 2_700))),
    "exif-endless.jpg": lambda: with_segments(segment(APP1, EXIF + tiff.endless())),
    "exif-empty.jpg": lambda: with_segments(segment(APP1, EXIF)),
    "multi-picture.jpg": lambda: with_segments(segment(APP2, b"MPF\0" + tiff.many_entries(65_000, 2_700))),
    # Frames that lie.
    "lying-size.jpg": lambda: resized(65_535, 65_535),
    "lying-size-in-limits.jpg": lambda: resized(7071, 7071),
    "lying-progressive.jpg": lambda: resized(7071, 7071, plain(progressive=True)),
    "lying-cmyk.jpg": lambda: resized(7071, 7071, plain("CMYK")),
    "lying-progressive-cmyk.jpg": lambda: resized(7071, 7071, plain("CMYK", progressive=True)),
    "lying-column.jpg": lambda: resized(1, 65_535),
    "lying-row.jpg": lambda: resized(65_535, 1),
    "zero-width.jpg": lambda: resized(0, 64),
    "zero-height.jpg": lambda: resized(64, 0),
    "large-frame-first.jpg": lambda: with_segments(resized(7071, 7071)[(at := frame_at(plain())) : at + 19]),
    "two-frames.jpg": lambda: with_segments(resized(8, 8)[(at := frame_at(plain())) : at + 19]),
    "twelve-bit.jpg": lambda: frame_with(4, 12),
    "sampling-4-by-4.jpg": lambda: frame_with(11, 0x44),
    "sampling-15-by-15.jpg": lambda: frame_with(11, 0xFF),
    "sampling-zero.jpg": lambda: frame_with(11, 0),
    "two-components.jpg": lambda: frame_with(9, 2),
    "many-components.jpg": lambda: frame_with(9, 255),
    # Rare kinds.
    "arithmetic.jpg": lambda: recoded(SOF9),
    "arithmetic-large.jpg": lambda: recoded(SOF9, resized(7071, 7071)),
    "lossless-coding.jpg": lambda: recoded(SOF3),
    "baseline-called-progressive.jpg": lambda: recoded(SOF2),
    "progressive-called-baseline.jpg": lambda: recoded(SOF0, plain(progressive=True)),
    "cmyk-called-ycck.jpg": lambda: with_segments(segment(APP14, b"Adobe\0\x64\0\0\0\0\2"), base=plain("CMYK")),
    "zero-quantisation.jpg": lambda: with_segments(segment(DQT, bytes(65))),
    "thumbnail.jpg": lambda: with_segments(segment(APP0, b"JFIF\0\1\1\0\0\1\0\1\xff\xff")),
    # Damage.
    "start-only.jpg": lambda: START + b"\xff",
    "no-end.jpg": lambda: plain()[:-2],
    "no-scan.jpg": lambda: plain()[: plain().rindex(b"\xff\xda")] + END,
    "no-tables.jpg": lambda: plain().replace(b"\xff\xc4", b"\xff\xfe"),
    "short-segment.jpg": lambda: with_segments(b"\xff\xfe\0\0"),
    "long-segment.jpg": lambda: with_segments(b"\xff\xfe\xff\xff")[:1000],
}
