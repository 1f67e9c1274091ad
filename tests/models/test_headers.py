from __future__ import annotations

import io
import struct

import pytest
from PIL import Image

from camcal.models.headers import (
    MAX_SIDE,
    ImageTooLargeError,
    UndecodableImageError,
    UnsupportedFormatError,
    orientation,
    read_header,
)
from tests.service.crafted import CASES, SEEDS

WITHOUT_END = (
    "fill-bytes.jpg",
    "rubbish-between.jpg",
    "tiny-comments.jpg",
    "huffman-tables.jpg",
    "text-many.png",
    "tiny-chunks.png",
    "one-byte-idats.png",
    "frames.png",
    "comment-of-bytes.gif",
    "comments.gif",
    "extensions.gif",
    "unknown-bytes.gif",
)


@pytest.mark.parametrize("name", SEEDS)
def test_size_is_that_of_the_picture(name: str) -> None:
    data = SEEDS[name]()
    header = read_header(data)
    with Image.open(io.BytesIO(data)) as image:
        assert (header.format, header.width, header.height) == (image.format, *image.size)
    assert not header.odd or "cmyk" in name
    assert read_header(memoryview(bytearray(data))) == header


@pytest.mark.parametrize(
    ("name", "channels", "depth"),
    [("one-bit.png", 1, 1), ("rgba16.png", 4, 16), ("palette.png", 1, 8), ("grey.jpg", 1, 8), ("cmyk.jpg", 4, 8)],
)
def test_channels_and_depth(name: str, channels: int, depth: int) -> None:
    header = read_header(SEEDS[name]())
    assert (header.channels, header.depth) == (channels, depth)


def test_scans_of_a_jpeg() -> None:
    baseline, progressive = read_header(SEEDS["baseline.jpg"]()), read_header(SEEDS["progressive.jpg"]())
    assert (baseline.scans, baseline.progressive) == (1, False)
    assert progressive.scans > 5 and progressive.progressive
    with pytest.raises(ImageTooLargeError, match="more than 100 scans"):
        read_header(CASES["many-scans.jpg"]())
    # A thumbnail's scans are not the picture's.
    assert read_header(CASES["thumbnail.jpg"]()).scans == 1


@pytest.mark.parametrize("name", WITHOUT_END)
def test_headers_without_end_are_refused(name: str) -> None:
    with pytest.raises(UndecodableImageError, match="the image is damaged"):
        read_header(CASES[name]())


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("rle")])
def test_run_length_encoded_bmp_is_refused_with_what_to_do(name: str) -> None:
    with pytest.raises(UnsupportedFormatError, match="run-length encoded BMP; save it as PNG"):
        read_header(CASES[name]())


@pytest.mark.parametrize("name", ["one-column.png", "one-row.bmp", "huge-canvas.webp", "far-frame.gif"])
def test_long_sides_are_refused(name: str) -> None:
    with pytest.raises(ImageTooLargeError, match=rf"a side may have {MAX_SIDE} at most"):
        read_header(CASES[name]())


@pytest.mark.parametrize("name", ["arithmetic.jpg", "two-frames.jpg", "twelve-bit.jpg", "many-components.jpg"])
def test_unusual_jpegs_are_odd(name: str) -> None:
    assert read_header(CASES[name]()).odd


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"RIFF\0\0\0\0WEBPVP8 "]
)
def test_cut_headers_are_refused(data: bytes) -> None:
    with pytest.raises((UndecodableImageError, UnsupportedFormatError)):
        read_header(data)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("value", range(1, 9))
def test_orientation(order: str, value: int) -> None:
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    entries = struct.pack(order + "HHHII", 2, 0x010F, 2, 40_000, 99) + struct.pack(
        order + "HHIHH", 0x0112, 3, 1, value, 0
    )
    assert orientation(b"Exif\0\0" + start + entries) == orientation(start + entries) == value


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"neither II nor MM",
        b"II*\0\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\xff\xff",
        b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\x09\0\0\0",  # 9
        b"II*\0\x08\0\0\0\1\0\x12\1\2\0\1\0\0\0\6\0\0\0",  # as text
    ],
)
def test_orientation_that_cannot_be_understood_is_upright(block: bytes) -> None:
    assert orientation(block) == 1
