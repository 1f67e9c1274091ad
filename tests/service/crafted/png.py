"""PNG files that take much memory or time, or lie."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

from tests.service.crafted import tiff

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE, RGBA = 0, 2, 3, 6
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, RGBA: 4}
LONG = 19_000_000  # bytes, just under the largest file that is accepted
# Where the seven passes of Adam7 begin, and their steps: x, y, step x, step y.
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
BOMB = 500_000_000  # bytes once decompressed


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def zeros(count: int) -> bytes:
    """A zlib stream of `count` zeros, made without holding them."""
    deflate, piece = zlib.compressobj(9), bytes(2**20)
    whole = b"".join(deflate.compress(piece) for _ in range(count // len(piece)))
    return whole + deflate.compress(bytes(count % len(piece))) + deflate.flush()


def header(width: int, height: int, depth: int, colour: int, interlace: int = 0) -> bytes:
    return SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))


def png(
    width: int, height: int, depth: int, colour: int, raw: bytes | None = None, *extra: bytes, interlace: int = 0
) -> bytes:
    """A PNG of the scan lines `raw`, zeros by default, with `extra` chunks before them."""
    line = 1 + -(-width * depth * CHANNELS[colour] // 8)
    data = zeros(line * height) if raw is None else zlib.compress(raw)
    return header(width, height, depth, colour, interlace) + b"".join(extra) + chunk(b"IDAT", data) + chunk(b"IEND")


def small(*extra: bytes, data: bytes | None = None, end: bytes = chunk(b"IEND")) -> bytes:
    """8×8 grey pixels; `extra` comes before the data."""
    body = chunk(b"IDAT", zlib.compress((b"\0" + bytes(range(0, 240, 30))) * 8)) if data is None else data
    return header(8, 8, 8, GREY) + b"".join(extra) + body + end


def interlaced(side: int) -> bytes:
    """A black RGB picture in the seven passes of Adam7."""
    length = 0
    for x, y, step_x, step_y in ADAM7:
        columns, rows = len(range(x, side, step_x)), len(range(y, side, step_y))
        length += rows * (1 + 3 * columns) if columns else 0
    return header(side, side, 8, RGB, 1) + chunk(b"IDAT", zeros(length)) + chunk(b"IEND")


def one_byte_idats() -> bytes:
    data = zlib.compress(bytes(4_000 * 4_001), 0)[: LONG // 13]
    return header(4_000, 4_000, 8, GREY) + b"".join(chunk(b"IDAT", bytes([byte])) for byte in data) + chunk(b"IEND")


def animated(frames: int) -> bytes:
    """An APNG that promises 2³¹−1 frames and has `frames`, all of one pixel."""
    control = struct.pack(">IIIIHHBB", 8, 8, 0, 0, 1, 1, 0, 0)
    start = chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)) + chunk(b"fcTL", struct.pack(">I", 0) + control)
    pixel = zlib.compress(b"\0\0")
    rest = b"".join(
        chunk(b"fcTL", struct.pack(">IIIIIHHBB", 2 * n + 1, 1, 1, 0, 0, 1, 1, 0, 0))
        + chunk(b"fdAT", struct.pack(">I", 2 * n + 2) + pixel)
        for n in range(frames)
    )
    return small(start, end=rest + chunk(b"IEND"))


GREY16 = (b"\0" + b"\0\0" * 32 + b"\x80\x80" * 32) * 64  # left half black, right half grey

CASES: dict[str, Callable[[], bytes]] = {
    # As many pixels as are accepted, from few bytes.
    "one-bit.png": lambda: png(7071, 7071, 1, GREY),
    "one-column.png": lambda: png(1, 50_000_000, 8, RGB),
    "one-row.png": lambda: png(50_000_000, 1, 8, RGB),
    "rgba16.png": lambda: png(7071, 7071, 16, RGBA),
    "grey16-large.png": lambda: png(7071, 7071, 16, GREY),
    "interlaced-large.png": lambda: interlaced(7071),
    "transparent-palette.png": lambda: png(
        7071, 7071, 8, PALETTE, None, chunk(b"PLTE", bytes(768)), chunk(b"tRNS", bytes(256))
    ),
    # Bombs beside the pixels.
    "ztxt-bomb.png": lambda: small(chunk(b"zTXt", b"k\0\0" + zeros(BOMB))),
    "itxt-bomb.png": lambda: small(chunk(b"iTXt", b"k\0\1\0\0\0" + zeros(BOMB))),
    "iccp-bomb.png": lambda: small(chunk(b"iCCP", b"k\0\0" + zeros(BOMB))),
    "ztxt-many.png": lambda: small(chunk(b"zTXt", b"k\0\0" + zeros(1_000_000)) * 2_000),
    "text-many.png": lambda: small(chunk(b"tEXt", b"k\0") * (LONG // 14)),
    "tiny-chunks.png": lambda: small(chunk(b"prIv") * (LONG // 12)),
    "one-byte-idats.png": one_byte_idats,
    "too-much-data.png": lambda: small(data=chunk(b"IDAT", zeros(BOMB))),
    "exif-entries.png": lambda: small(chunk(b"eXIf", tiff.many_entries(LONG))),
    "exif-after-data.png": lambda: small(end=chunk(b"eXIf", tiff.many_entries(LONG)) + chunk(b"IEND")),
    "exif-endless.png": lambda: small(chunk(b"eXIf", tiff.endless())),
    "frames.png": lambda: animated(100_000),
    # Lies and damage.
    "huge-size.png": lambda: png(2**31 - 1, 2**31 - 1, 8, GREY, b""),
    "zero-size.png": lambda: png(0, 0, 8, GREY, b""),
    "wrong-depth.png": lambda: png(8, 8, 7, RGB),
    "wrong-crc.png": lambda: small().replace(b"IHDR\0", b"IHDR\1", 1),
    "no-palette.png": lambda: png(8, 8, 8, PALETTE),
    "palette-too-small.png": lambda: png(8, 8, 8, PALETTE, (b"\0" + b"\xff" * 8) * 8, chunk(b"PLTE", b"\1\2\3")),
    "palette-too-large.png": lambda: png(8, 8, 8, PALETTE, None, chunk(b"PLTE", bytes(3_000_000))),
    "transparency-too-long.png": lambda: small(chunk(b"tRNS", bytes(100_000))),
    "long-chunk.png": lambda: header(8, 8, 8, GREY) + b"\xff\xff\xff\xffIDAT",
    "short-chunks.png": lambda: small(*(chunk(kind, b"\0") for kind in (b"gAMA", b"cHRM", b"pHYs", b"sRGB", b"acTL"))),
    "two-headers.png": lambda: small(header(7000, 7000, 8, RGB)[len(SIGNATURE) :]),
    "too-few-lines.png": lambda: png(4000, 4000, 8, RGB, bytes(4000)),
    "no-data.png": lambda: small(data=b""),
    # Not harmful: the right answer is known.
    "grey16-transparent.png": lambda: png(64, 64, 16, GREY, GREY16, chunk(b"tRNS", b"\0\0")),
    "rubbish-after-data.png": lambda: (
        header(64, 64, 16, GREY) + chunk(b"IDAT", zlib.compress(GREY16)) + b"\0\0\0\4abcd"
    ),
}
