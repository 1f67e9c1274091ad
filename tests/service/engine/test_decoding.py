from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from camcal.models.headers import read_header
from camcal.models.preprocessing import Preprocessing
from camcal.service.engine.decoding import (
    PICTURE_SIDE,
    Decoded,
    ImageTooLargeError,
    LargeImageError,
    Limits,
    UndecodableImageError,
    UnsupportedFormatError,
    decode,
    shrink_of,
)
from tests.service.conftest import encoded, picture
from tests.service.crafted import CASES, SEEDS

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


def test_transparency_becomes_white() -> None:
    rgba = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert (decoded(encoded(rgba)).pixels == 255).all()
    palette = Image.new("P", (40, 40), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert (decoded(encoded(palette, "GIF", transparency=0)).pixels == 255).all()
    assert (decoded(encoded(palette, "PNG", transparency=0)).pixels == 255).all()


def test_gif_decodes_its_first_frame() -> None:
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


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # as camcal.service.engine.decoding does, outside of pytest
@pytest.mark.parametrize("block", [b"II*\0\xff\xff\xff\xff", b"neither II nor MM"])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_damaged_exif_is_ignored(format: str, block: bytes) -> None:
    data = encoded(picture(), format, exif=b"Exif\0\0" + block)
    np.testing.assert_array_equal(decoded(data).pixels, decoded(encoded(picture(), format)).pixels)


def test_picture_shows_the_part_that_the_network_sees() -> None:
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
    """A PNG whose header declares many pixels, without any pixel data."""

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
    with pytest.raises(ImageTooLargeError, match="is 60000×60000 px; the limit is"):
        decoded(bytes(data))


@given(
    name=st.sampled_from(FORMATS),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
    keep=st.floats(0.05, 1),
)
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_no_input_raises_any_other_error(name: str, changes: list[tuple[float, int]], keep: float) -> None:
    data = bytearray(SAMPLES[name])
    for place, value in changes:
        data[int(place * len(data))] = value
    try:
        decoded(bytes(data[: int(keep * len(data))]))
    except (UnsupportedFormatError, UndecodableImageError, ImageTooLargeError) as error:
        assert "\n" not in str(error)


def test_time_and_memory_are_limited_before_decoding() -> None:
    scans, large = CASES["many-scans-of-a-large-picture.jpg"](), CASES["lossless.webp"]()
    wide = Limits(max_bytes=20_000_000, max_pixels=50_000_000, large_bytes=512 * 2**20, decode_cpu_s=2.0)
    with pytest.raises(ImageTooLargeError, match=r"in 66 scans: decoding it takes about .* \(CAMCAL_DECODE_CPU_S\)"):
        decode(scans, RULE, wide)
    with pytest.raises(
        ImageTooLargeError, match=r"takes \d+ MiB of memory; the limit is 512 MiB \(CAMCAL_LARGE_BYTES\)"
    ):
        decode(large, RULE, wide)


@pytest.mark.parametrize(
    ("name", "ordinary"),
    [
        ("baseline.jpg", True),
        ("progressive.jpg", True),
        ("rgba.png", True),
        ("lossy.webp", True),
        ("cmyk.jpg", False),  # only Pillow decodes it
        ("one-bit.png", False),  # 50 megapixels in 6 KB
        ("lying-progressive.jpg", False),
        ("ztxt-many.png", False),
        ("long-profile.webp", False),
        ("cut-at-0.999-baseline.jpg", False),  # Pillow may decode it
    ],
)
def test_only_ordinary_images_are_decoded_in_a_thread(name: str, ordinary: bool) -> None:
    data = SEEDS[name]() if ordinary or name not in CASES else CASES[name]()
    wide = Limits(max_bytes=20_000_000, max_pixels=50_000_000)
    if ordinary:
        assert decode(data, RULE, wide, ordinary_bytes=48 * 2**20).pixels.shape == (32, 32, 3)
        with pytest.raises(LargeImageError):
            decode(data, RULE, wide, ordinary_bytes=2**20)
    else:
        with pytest.raises(LargeImageError) as raised:
            decode(data, RULE, wide, ordinary_bytes=48 * 2**20)
        assert raised.value.data is data


LARGE = Limits(max_bytes=10_000_000, max_pixels=20_000_000)
WHOLE = RULE.model_copy(update={"fit": "stretch", "resize": 32})


def photograph(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """An image with smooth colours, noise and edges, like a photograph."""
    rng = np.random.default_rng(seed)
    image = np.asarray(picture(seed, size)).astype(int) + rng.integers(-20, 20, size=(size[1], size[0], 3))
    image[size[1] // 3 : size[1] // 2, size[0] // 4 : size[0] // 2] //= 3
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_at_full_size_equals_pillow_bit_for_bit(mode: str, options: dict[str, int]) -> None:
    for seed in range(4):
        data = encoded(photograph((301 + seed, 203), seed).convert(mode), "JPEG", **options)
        with Image.open(io.BytesIO(data)) as image:
            expected = WHOLE.apply(image.convert("RGB"))
        np.testing.assert_array_equal(decode(data, WHOLE, LIMITS).pixels, expected)


@pytest.mark.parametrize(
    ("size", "with_picture", "shrunk"),
    [
        ((100, 100), False, 1),
        ((128, 128), False, 2),
        ((255, 1000), False, 2),
        ((256, 1000), False, 4),
        ((3000, 2000), False, 8),
        ((1023, 1000), True, 1),
        ((1024, 1000), True, 2),
        ((3000, 2001), True, 4),
    ],
)
def test_large_jpeg_is_decoded_at_reduced_size(size: tuple[int, int], with_picture: bool, shrunk: int) -> None:
    data = encoded(photograph(size), "JPEG", quality=90)
    assert shrink_of(read_header(data), WHOLE, with_picture) == shrunk
    result = decode(data, WHOLE, LARGE, picture=with_picture)
    assert (result.width, result.height) == size
    with Image.open(io.BytesIO(data)) as whole:
        difference = np.abs(WHOLE.apply(whole.convert("RGB")).astype(int) - result.pixels)
    assert difference.mean() < 1.5
    if with_picture:
        assert max(result.picture_size) == 512 or shrunk == 1


def test_reduced_jpeg_is_upright() -> None:
    image = photograph((800, 400))
    exif = image.getexif()
    exif[0x0112] = 6
    result = decode(encoded(image, "JPEG", exif=exif), WHOLE, LARGE, picture=False)
    assert (result.width, result.height) == (400, 800)
    upright = WHOLE.apply(image.transpose(Image.Transpose.ROTATE_270))
    assert np.abs(upright.astype(int) - result.pixels).mean() < 4


def test_damaged_and_cmyk_jpegs_are_reduced_too() -> None:
    cmyk = encoded(photograph((800, 600)).convert("CMYK"), "JPEG")
    assert decode(cmyk, WHOLE, LARGE, picture=False).width == 800
    data = encoded(photograph((800, 600)), "JPEG") + b"rubbish after the end"
    assert decode(data, WHOLE, LARGE, picture=False).height == 600


def test_small_jpeg_is_stored_unchanged() -> None:
    data = encoded(photograph((400, 300)), "JPEG", quality=80)
    kept = decode(data, WHOLE, LARGE)
    assert (kept.picture, kept.picture_size) == (data, (400, 300))
    for other in (
        decode(data, RULE, LARGE),  # the network sees only a part
        decode(encoded(photograph((800, 300)), "JPEG"), WHOLE, LARGE),  # too wide
        decode(encoded(photograph((600, 600)), "JPEG", quality=100, subsampling=0), WHOLE, LARGE),  # too many bytes
        decode(encoded(photograph((400, 300)), "PNG"), WHOLE, LARGE),
    ):
        with Image.open(io.BytesIO(other.picture)) as image:
            assert (image.format, image.size) == ("JPEG", other.picture_size)
            assert other.picture != data


@pytest.mark.parametrize("length", [20, 70_000])
def test_comments_are_dropped(length: int) -> None:
    result = decoded(encoded(picture(), "GIF", comment=b"SECRET".ljust(length, b".")))
    assert b"SECRET" not in result.picture
    with Image.open(io.BytesIO(result.picture)) as kept:
        assert "comment" not in kept.info


@pytest.mark.parametrize(("size", "shrunk"), [((100, 100), 1), ((1000, 255), 8), ((3000, 60), 8), ((127, 127), 1)])
def test_letterboxed_jpeg_is_reduced_by_its_longest_side(size: tuple[int, int], shrunk: int) -> None:
    rule = RULE.model_copy(update={"fit": "letterbox", "resize": 32})
    data = encoded(photograph(size), "JPEG", quality=90)
    assert shrink_of(read_header(data), rule, picture=False) == shrunk
    result = decode(data, rule, LARGE)
    assert (result.width, result.height) == size
    assert abs(result.picture_size[0] / result.picture_size[1] - size[0] / size[1]) < 0.1 * size[0] / size[1]
    with Image.open(io.BytesIO(data)) as whole:
        expected = rule.apply(whole.convert("RGB")).astype(int)
    assert np.abs(expected - decode(data, rule, LARGE, picture=False).pixels).mean() < 1.5
    kept = decode(encoded(photograph((400, 300)), "JPEG", quality=80), rule, LARGE)
    assert kept.picture_size == (400, 300)  # the network sees all of it
