"""BMP files: run-length codes, bit fields, palettes, lying headers."""

from __future__ import annotations

import struct
from collections.abc import Callable

RGB, RLE8, RLE4, BITFIELDS, EMBEDDED_JPEG = 0, 1, 2, 3, 4
BLACK = bytes(4 * 256)  # a palette


def bmp(
    width: int,
    height: int,
    bits: int,
    data: bytes,
    *,
    compression: int = RGB,
    palette: bytes = b"",
    colours: int | None = None,
    offset: int | None = None,
    masks: bytes = b"",
) -> bytes:
    """A BMP with the header of 40 bytes; by default `colours` and the `offset` of the pixels are true."""
    start = 14 + 40 + len(masks) + len(palette) if offset is None else offset
    count = len(palette) // 4 if colours is None else colours
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 2835, 2835, count, 0)
    return b"BM" + struct.pack("<IHHI", (start + len(data)) % 2**32, 0, 0, start) + info + masks + palette + data


def line(width: int, bits: int) -> bytes:
    return bytes(-(-width * bits // 32) * 4)


def with_header(size: int) -> bytes:
    """A header that says it has `size` bytes."""
    plain = bmp(8, 8, 24, line(8, 24) * 8)
    return plain[:14] + struct.pack("<I", size) + plain[18:]


def os2() -> bytes:
    """The oldest header, of 12 bytes."""
    data = line(8, 24) * 8
    return b"BM" + struct.pack("<IHHI", 26 + len(data), 0, 0, 26) + struct.pack("<IHHHH", 12, 8, 8, 1, 24) + data


MASKS_565 = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
MASKS_888 = struct.pack("<III", 0xFF0000, 0xFF00, 0xFF)

CASES: dict[str, Callable[[], bytes]] = {
    "rle8-line.bmp": lambda: bmp(50_000_000, 1, 8, b"\1\1\0\0", compression=RLE8, palette=BLACK),
    "rle8-column.bmp": lambda: bmp(1, 50_000_000, 8, b"\0\0" * 9_000_000, compression=RLE8, palette=BLACK),
    "rle8-square.bmp": lambda: bmp(7071, 7071, 8, b"\xff\0" * 200_000 + b"\0\1", compression=RLE8, palette=BLACK),
    "rle8-deltas.bmp": lambda: bmp(7071, 7071, 8, b"\0\2\0\1" * 7_000 + b"\0\1", compression=RLE8, palette=BLACK),
    "rle8-short-runs.bmp": lambda: bmp(4000, 2000, 8, b"\1\1" * 8_000_000, compression=RLE8, palette=BLACK),
    "rle8-ends-early.bmp": lambda: bmp(8, 8, 8, b"\0\1", compression=RLE8, palette=BLACK),
    "rle4-line.bmp": lambda: bmp(50_000_000, 1, 4, b"\2\1\0\0", compression=RLE4, palette=BLACK[:64]),
    "rle4-literal.bmp": lambda: bmp(64, 64, 4, b"\0\xff" + bytes(128), compression=RLE4, palette=BLACK[:64]),
    "one-bit.bmp": lambda: bmp(7071, 7071, 1, line(7071, 1) * 7071, palette=BLACK[:8]),
    "one-row.bmp": lambda: bmp(50_000_000, 1, 1, line(50_000_000, 1), palette=BLACK[:8]),
    "one-column.bmp": lambda: bmp(1, 4_700_000, 1, line(1, 1) * 4_700_000, palette=BLACK[:8]),
    "cut-32-bit.bmp": lambda: bmp(7071, 7071, 32, bytes(1000)),
    "cut-24-bit.bmp": lambda: bmp(7071, -7071, 24, bytes(1000)),
    "bitfields-565.bmp": lambda: bmp(8, 8, 16, line(8, 16) * 8, compression=BITFIELDS, masks=MASKS_565),
    "bitfields-888.bmp": lambda: bmp(8, 8, 32, line(8, 32) * 8, compression=BITFIELDS, masks=MASKS_888),
    "bitfields-zero.bmp": lambda: bmp(8, 8, 32, line(8, 32) * 8, compression=BITFIELDS, masks=bytes(12)),
    "bitfields-missing.bmp": lambda: bmp(8, 8, 32, b"", compression=BITFIELDS),
    "huge-palette.bmp": lambda: bmp(8, 8, 8, b"", palette=bytes(19_000_000)),
    "lying-palette.bmp": lambda: bmp(8, 8, 8, line(8, 8) * 8, palette=BLACK, colours=2**32 - 1),
    "no-palette.bmp": lambda: bmp(8, 8, 8, line(8, 8) * 8),
    "embedded-jpeg.bmp": lambda: bmp(8, 8, 0, b"\xff\xd8\xff\xd9", compression=EMBEDDED_JPEG),
    "unknown-compression.bmp": lambda: bmp(8, 8, 8, b"", compression=99, palette=BLACK),
    "offset-past-the-end.bmp": lambda: bmp(8, 8, 24, line(8, 24) * 8, offset=2**32 - 1),
    "offset-in-the-header.bmp": lambda: bmp(8, 8, 24, line(8, 24) * 8, offset=2),
    "negative-width.bmp": lambda: bmp(-8, 8, 24, line(8, 24) * 8),
    "lowest-height.bmp": lambda: bmp(8, -(2**31), 24, line(8, 24) * 8),
    "zero-size.bmp": lambda: bmp(0, 0, 24, b""),
    "header-of-0-bytes.bmp": lambda: with_header(0),
    "header-of-4-gigabytes.bmp": lambda: with_header(2**32 - 1),
    "header-of-124-bytes-cut.bmp": lambda: with_header(124)[:60],
    "os2.bmp": os2,
}
