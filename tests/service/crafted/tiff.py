"""EXIF blocks, which are TIFF directories, as JPEG, PNG and WebP carry them."""

from __future__ import annotations

import struct

BYTE, LONG = 1, 4
ORIENTATION, EXIF_POINTER = 0x0112, 0x8769


def exif(entries: list[tuple[int, int, int, int]], blob: bytes = b"", next_ifd: int = 0) -> bytes:
    """One directory of (tag, type, count, value or offset), then the offset of the next one, then `blob`."""
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return head + b"".join(struct.pack("<HHII", *entry) for entry in entries) + struct.pack("<I", next_ifd) + blob


def many_entries(size: int, count: int = 65_535) -> bytes:
    """`count` entries of different tags, each of which claims nearly all of a block of `size` bytes."""
    start = 14 + 12 * count
    entries = [(tag, BYTE, size - start, start) for tag in range(count)]
    return exif(entries, bytes(size - start))


def endless() -> bytes:
    """A directory that is its own next one and its own EXIF directory."""
    return exif([(ORIENTATION, LONG, 1, 6), (EXIF_POINTER, LONG, 1, 8)], next_ifd=8)
