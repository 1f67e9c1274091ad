"""GIF files: comments without end, frames that do not fit their screen, codes that say nothing."""

from __future__ import annotations

import struct
from collections.abc import Callable

PALETTE = bytes(range(256)) + bytes(128)  # 128 colours
LONG = 19_000_000  # bytes, just under the largest file that is accepted
CLEAR, END = b"\x80", b"\x81"  # codes of 8 bits; they stay so long as the table is cleared every 100 codes or so
END_OF_BLOCKS = b"\0"


def blocks(data: bytes, size: int = 255) -> bytes:
    """`data` in sub-blocks, each behind its length."""
    parts = (data[at : at + size] for at in range(0, len(data), size))
    return b"".join(bytes([len(part)]) + part for part in parts) + END_OF_BLOCKS


def codes(pixels: bytes) -> bytes:
    """LZW codes that compress nothing."""
    return b"".join(CLEAR + pixels[at : at + 100] for at in range(0, len(pixels), 100)) + END


def frame(width: int, height: int, data: bytes | None = None, left: int = 0, top: int = 0, flags: int = 0) -> bytes:
    """One picture at a place of the screen; by default of colour 1."""
    body = blocks(codes(b"\1" * (width * height))) if data is None else data
    return b"," + struct.pack("<HHHHB", left, top, width, height, flags) + b"\7" + body


def comment(data: bytes) -> bytes:
    return b"!\xfe" + data


def control(transparent: int) -> bytes:
    """A graphic control extension with a transparent colour."""
    return b"!\xf9\4\1\0\0" + bytes([transparent]) + b"\0"


def gif(width: int, height: int, *parts: bytes, end: bytes = b";") -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0xF6, 0, 0) + PALETTE + b"".join(parts) + end


def repeated(block: bytes) -> bytes:
    """A block of codes, over and over."""
    return block * (LONG // len(block)) + END_OF_BLOCKS


CASES: dict[str, Callable[[], bytes]] = {
    # Pillow adds each sub-block of a comment to a copy of those before.
    "comment.gif": lambda: gif(8, 8, comment(blocks(bytes(LONG))), frame(8, 8)),
    "comment-of-bytes.gif": lambda: gif(8, 8, comment(b"\1x" * (LONG // 2) + END_OF_BLOCKS), frame(8, 8)),
    "comments.gif": lambda: gif(8, 8, comment(blocks(b"x")) * (LONG // 5), frame(8, 8)),
    "comments-after.gif": lambda: gif(8, 8, frame(8, 8), comment(blocks(b"x")) * (LONG // 5)),
    "extensions.gif": lambda: gif(8, 8, control(5) * (LONG // 8), frame(8, 8)),
    "application-data.gif": lambda: gif(
        8, 8, b"!\xff\x0bNETSCAPE2.0" + b"\1x" * (LONG // 2) + END_OF_BLOCKS, frame(8, 8)
    ),
    "unknown-bytes.gif": lambda: gif(8, 8, bytes(LONG), frame(8, 8)),
    "frames.gif": lambda: gif(8, 8, frame(1, 1) * 1_000_000),
    "clear-codes.gif": lambda: gif(7071, 7071, frame(7071, 7071, repeated(b"\xff" + CLEAR * 255))),
    "one-byte-blocks.gif": lambda: gif(4000, 4000, frame(4000, 4000, repeated(b"\1" + CLEAR + b"\1\1"))),
    # Sizes that do not agree.
    "small-first-frame.gif": lambda: gif(64, 64, frame(32, 32)),
    "shifted-frame.gif": lambda: gif(64, 64, frame(32, 32, left=16, top=16)),
    "large-frame.gif": lambda: gif(8, 8, frame(64, 64)),
    "far-frame.gif": lambda: gif(8, 8, frame(8, 8, left=65_535, top=65_535)),
    "far-frame-in-limits.gif": lambda: gif(8, 8, frame(8, 8, left=7_000, top=7_000)),
    "huge-screen.gif": lambda: gif(65_535, 65_535, frame(1, 1)),
    "large-screen.gif": lambda: gif(7071, 7071, frame(1, 1)),
    "large-transparent-screen.gif": lambda: gif(7071, 7071, control(1), frame(1, 1)),
    "huge-frame.gif": lambda: gif(8, 8, frame(65_535, 65_535, blocks(codes(b"\1" * 64)))),
    "large-cut-frame.gif": lambda: gif(7071, 7071, frame(7071, 7071, blocks(codes(b"\1" * 64)))),
    "interlaced-cut-frame.gif": lambda: gif(7071, 7071, frame(7071, 7071, blocks(codes(b"\1" * 64)), flags=0x40)),
    "zero-screen.gif": lambda: gif(0, 0, frame(8, 8)),
    "zero-frame.gif": lambda: gif(8, 8, frame(0, 0)),
    # Damage.
    "no-frame.gif": lambda: gif(8, 8),
    "wrong-code.gif": lambda: gif(8, 8, frame(8, 8, blocks(CLEAR + b"\xff" * 64))),
    "no-end.gif": lambda: gif(8, 8, frame(8, 8), end=b""),
    "long-code-size.gif": lambda: gif(8, 8, frame(8, 8).replace(b"\7", b"\xff", 1)),
    "endless-extension.gif": lambda: gif(8, 8, b"!\xfe" + b"\xff" * 600, end=b""),
    "local-palette-cut.gif": lambda: gif(8, 8, frame(8, 8, b"", flags=0x87), end=b""),
}
