"""WebP files: lossless pictures of 30 bytes, canvases that lie, chunks without end."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

from PIL import Image

from tests.service.crafted import tiff

LONG = 19_000_000  # bytes, just under the largest file that is accepted
ANIMATION, EXIF, PROFILE = 0x02, 0x08, 0x20  # flags of VP8X


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)


def webp(*chunks: bytes, size: int | None = None) -> bytes:
    """The container; `size` is what its header says, the truth by default."""
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


def lossless(width: int, height: int) -> bytes:
    """A lossless picture in which every code has one symbol, so that no pixel takes a bit."""
    bits = (width - 1) | (height - 1) << 14
    one_symbol = 0b0001  # a simple code (1) of one symbol (0) of one bit (0), which is 0
    codes = sum(one_symbol << 3 + 4 * n for n in range(5))  # after three bits: no transform, no cache, no meta codes
    return chunk(b"VP8L", b"\x2f" + struct.pack("<I", bits) + codes.to_bytes(4, "little"))


def extended(flags: int, width: int, height: int) -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return chunk(b"VP8X", bytes([flags, 0, 0, 0]) + size)


def animation(width: int, height: int, *frames: bytes) -> bytes:
    return webp(extended(ANIMATION, width, height), chunk(b"ANIM", bytes(6)), *frames)


def frame(width: int, height: int, left: int = 0, top: int = 0) -> bytes:
    numbers = (left // 2, top // 2, width - 1, height - 1, 100)
    place = b"".join(number.to_bytes(3, "little") for number in numbers)
    return chunk(b"ANMF", place + b"\0" + lossless(width, height))


def lossy(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "grey").save(buffer, "WEBP", method=0, quality=1)
    return buffer.getvalue()


CASES: dict[str, Callable[[], bytes]] = {
    "lossless.webp": lambda: webp(lossless(7071, 7071)),
    "lossless-too-large.webp": lambda: webp(lossless(16_384, 16_384)),
    "lossless-row.webp": lambda: webp(lossless(16_384, 3_000)),
    "lossy.webp": lambda: lossy(7000, 7000),
    "animation-large.webp": lambda: animation(7071, 7071, frame(7070, 7070), frame(1, 1)),
    "animation-large-canvas.webp": lambda: animation(7071, 7071, frame(1, 1)),
    "animation-huge-canvas.webp": lambda: animation(2**24, 2**24, frame(1, 1)),
    "animation-many-frames.webp": lambda: animation(64, 64, *[frame(1, 1)] * 400_000),
    "animation-without-frames.webp": lambda: animation(64, 64),
    "animation-far-frame.webp": lambda: animation(8, 8, frame(8, 8, left=2**24, top=2**24)),
    "animation-large-frame.webp": lambda: animation(8, 8, frame(7071, 7071)),
    "huge-canvas.webp": lambda: webp(extended(0, 2**24, 2**24), lossless(8, 8)),
    "large-canvas.webp": lambda: webp(extended(0, 7071, 7071), lossless(8, 8)),
    "small-canvas.webp": lambda: webp(extended(0, 8, 8), lossless(7071, 7071)),
    "tiny-chunks.webp": lambda: webp(extended(0, 8, 8), lossless(8, 8), chunk(b"prIv") * (LONG // 8)),
    "tiny-chunks-first.webp": lambda: webp(extended(0, 8, 8), chunk(b"prIv") * (LONG // 8), lossless(8, 8)),
    "long-profile.webp": lambda: webp(extended(PROFILE, 8, 8), chunk(b"ICCP", bytes(LONG)), lossless(8, 8)),
    "exif-entries.webp": lambda: webp(extended(EXIF, 8, 8), lossless(8, 8), chunk(b"EXIF", tiff.many_entries(LONG))),
    "exif-endless.webp": lambda: webp(extended(EXIF, 8, 8), lossless(8, 8), chunk(b"EXIF", tiff.endless())),
    "two-pictures.webp": lambda: webp(lossless(8, 8), lossless(7071, 7071)),
    "size-zero.webp": lambda: webp(lossless(8, 8), size=0),
    "size-4-gigabytes.webp": lambda: webp(lossless(8, 8), size=2**32 - 2),
    "no-picture.webp": lambda: webp(),
    "no-codes.webp": lambda: webp(lossless(8, 8)[:13]),
    "damaged-lossy.webp": lambda: webp(chunk(b"VP8 ", b"\0\0\0\x9d\x01\x2a\xff\x1b\xff\x1b" + bytes(100))),
    "lossy-lies.webp": lambda: lossy(64, 64).replace(b"\x9d\x01\x2a\x40\0\x40\0", b"\x9d\x01\x2a\x9f\x1b\x9f\x1b"),
    "audio.webp": lambda: b"RIFF\x24\0\0\0WAVEfmt " + bytes(24),
}
