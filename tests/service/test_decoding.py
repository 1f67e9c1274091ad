from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from models.preprocessing import Preprocessing
from service.decoding import (
    PICTURE_SIDE,
    Decoded,
    ImageTooLargeError,
    Limits,
    UndecodableImageError,
    UnsupportedFormatError,
    decode,
)
from tests.service.conftest import encoded, picture

RULE = Preprocessing(fit="crop", resize=36, input_size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
LIMITS = Limits(max_bytes=1_000_000, max_pixels=100_000)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
SAMPLES = {name: encoded(picture(), name) for name in FORMATS}


def decoded(data: bytes) -> Decoded:
    return decode(data, RULE, LIMITS)


def grey(value: int) -> tuple[int, int, int]:
    return value, value, value


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name: str) -> None:
    result = decoded(SAMPLES[name])
    assert result.pixels.shape == (32, 32, 3)
    assert result.pixels.dtype == np.uint8
    assert (result.width, result.height) == (60, 40)
    with Image.open(io.BytesIO(SAMPLES[name])) as image:
        np.testing.assert_array_equal(result.pixels, RULE.apply(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    wide = Image.fromarray(np.asarray(picture(mode="L")).astype(np.uint16) * 257)
    image = wide if mode == "I;16" else picture(mode=mode)
    result = decoded(encoded(image, "JPEG" if mode == "CMYK" else "PNG"))
    expected = picture(mode="L" if mode in ("L", "LA", "I;16") else "RGB").convert("RGB")
    if mode not in ("1", "P"):
        assert np.abs(result.pixels.astype(int) - RULE.apply(expected)).mean() < 6


def test_transparency_lies_on_white() -> None:
    rgba = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert (decoded(encoded(rgba)).pixels == 255).all()
    palette = Image.new("P", (40, 40), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert (decoded(encoded(palette, "GIF", transparency=0)).pixels == 255).all()
    assert (decoded(encoded(palette, "PNG", transparency=0)).pixels == 255).all()


def test_gif_gives_its_first_frame() -> None:
    first, second = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (40, 40), "blue")
    data = encoded(first, "GIF", save_all=True, append_images=[second])
    assert decoded(data).pixels[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    image = picture()
    exif = image.getexif()
    exif[0x0112] = orientation
    result = decoded(encoded(image, "PNG", exif=exif))
    with Image.open(io.BytesIO(encoded(image, "PNG", exif=exif))) as again:
        upright = ImageOps.exif_transpose(again)
    assert (result.width, result.height) == upright.size
    np.testing.assert_array_equal(result.pixels, RULE.apply(upright.convert("RGB")))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # as service.decoding does, outside of pytest
@pytest.mark.parametrize("block", [b"II*\0\xff\xff\xff\xff", b"neither II nor MM"])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_damaged_exif_is_ignored(format: str, block: bytes) -> None:
    data = encoded(picture(), format, exif=b"Exif\0\0" + block)
    np.testing.assert_array_equal(decoded(data).pixels, decoded(encoded(picture(), format)).pixels)


def test_picture_is_what_the_network_sees() -> None:
    rule = RULE.model_copy(update={"fit": "stretch", "resize": 32})
    result = decode(encoded(picture(size=(1200, 60)), "JPEG"), rule, LIMITS)
    with Image.open(io.BytesIO(result.picture)) as kept:
        assert kept.size == result.picture_size == (PICTURE_SIDE, 26)
    small = decode(encoded(picture(), "JPEG"), RULE, LIMITS)
    assert small.picture_size == (36, 36)  # 32/36 of the short side, never enlarged
    assert decode(encoded(picture()), RULE, LIMITS, picture=False).picture == b""


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_extreme_shapes(size: tuple[int, int]) -> None:
    result = decoded(encoded(Image.new("RGB", size, grey(200))))
    assert (result.pixels == 200).all()
    assert min(result.picture_size) >= 1


@pytest.mark.parametrize("data", [b"", b"hello", b"%PDF-1.7 ", b"II*\0rest", b"<svg/>"])
def test_other_formats_are_refused(data: bytes) -> None:
    with pytest.raises(UnsupportedFormatError, match="expected a JPEG, PNG, WebP, GIF or BMP image"):
        decoded(data)


@pytest.mark.parametrize("name", FORMATS)
def test_truncated_files_are_refused(name: str) -> None:
    data = SAMPLES[name]
    for share in (0.02, 0.5, 0.9):
        with pytest.raises(UndecodableImageError, match="damaged or truncated"):
            decoded(data[: max(17, int(len(data) * share))])


def test_too_many_bytes() -> None:
    with pytest.raises(ImageTooLargeError, match=r"has 200 bytes; the limit is 100 \(CAMCAL_MAX_BYTES\)"):
        decode(bytes(200), RULE, Limits(max_bytes=100, max_pixels=100))


@pytest.mark.parametrize("name", FORMATS)
def test_too_many_pixels(name: str) -> None:
    with pytest.raises(ImageTooLargeError, match=r"is 60×40 px; the limit is 0\.001 Mpx \(CAMCAL_MAX_PIXELS\)"):
        decode(SAMPLES[name], RULE, Limits(max_bytes=1_000_000, max_pixels=1000))


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises many pixels and holds none."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_size_is_checked_before_decoding() -> None:
    with pytest.raises(ImageTooLargeError, match="is 13000×13000 px"):
        decoded(png_header(13_000, 13_000))


def test_gif_frame_beyond_its_screen_is_too_large() -> None:
    data = bytearray(SAMPLES["GIF"])
    at = data.index(b",", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    data[at + 5 : at + 9] = struct.pack("<HH", 60_000, 60_000)
    with pytest.raises(ImageTooLargeError, match="too many pixels"):
        decoded(bytes(data))


@given(
    name=st.sampled_from(FORMATS),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
    keep=st.floats(0.05, 1),
)
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_no_bytes_raise_anything_else(name: str, changes: list[tuple[float, int]], keep: float) -> None:
    data = bytearray(SAMPLES[name])
    for place, value in changes:
        data[int(place * len(data))] = value
    try:
        decoded(bytes(data[: int(keep * len(data))]))
    except (UnsupportedFormatError, UndecodableImageError, ImageTooLargeError) as error:
        assert "\n" not in str(error)
