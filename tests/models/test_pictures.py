from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from camcal.models.headers import UndecodableImageError, read_header
from camcal.models.pictures import STRIP_PIXELS, Picture, UnusualJpegError, read_file, read_picture, to_rgb
from camcal.models.preprocessing import Preprocessing
from tests.models.test_colour import SRGB, display_p3
from tests.service.conftest import encoded, picture
from tests.service.crafted import CASES, SEEDS

RULE = Preprocessing(fit="stretch", resize=32, input_size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def read(data: bytes, *, patient: bool = True) -> Picture:
    return read_picture(data, read_header(data), patient=patient)


def pixels(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(read(data).rgb)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "CMYK"])
def test_strips_make_no_seams(mode: str) -> None:
    size = (1000, 3 * STRIP_PIXELS // 1000)
    ramp = np.linspace(0, 255, size[0] * size[1], dtype=np.uint8).reshape(size[::-1])
    image = Image.fromarray(np.stack([ramp, 255 - ramp, ramp // 2], axis=-1))
    if mode == "CMYK":
        expected = image.convert("CMYK").convert("RGB")
        image = image.convert("CMYK")
    else:
        alpha = Image.fromarray(ramp[:, ::-1].copy())
        image = image.convert("L" if mode == "LA" else "P" if "P" in mode else "RGB")
        if mode == "P":
            image.info["transparency"] = 7
        else:
            image.putalpha(alpha)
        expected = Image.alpha_composite(Image.new("RGBA", size, "white"), image.convert("RGBA")).convert("RGB")
    assert np.abs(np.asarray(to_rgb(image)).astype(int) - np.asarray(expected)).max() <= 1


def test_transparency_of_16_bit_grey_lies_on_white() -> None:
    result = pixels(CASES["grey16-transparent.png"]())
    assert (result[:, :32] == 255).all()
    assert (result[:, 32:] == 0x80).all()


@pytest.mark.parametrize(("name", "left", "top"), [("small-first-frame.gif", 0, 0), ("shifted-frame.gif", 16, 16)])
def test_around_a_small_first_frame_is_white(name: str, left: int, top: int) -> None:
    result = pixels(CASES[name]())
    assert result.shape == (64, 64, 3)
    frame = np.zeros((64, 64), dtype=bool)
    frame[top : top + 32, left : left + 32] = True
    assert (result[~frame] == 255).all()
    assert (result[frame] != 255).any(axis=-1).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_colours_are_those_of_the_profile(format: str) -> None:
    image, options = picture(), {"lossless": True} if format == "WEBP" else {}
    plain = read(encoded(image, format, **options)).pixels(RULE).astype(int)
    assert (read(encoded(image, format, icc_profile=SRGB, **options)).pixels(RULE) == plain).all()
    wide = read(encoded(image, format, icc_profile=display_p3(), **options))
    assert wide.altered
    assert np.abs(wide.pixels(RULE) - plain).max() > 5


def test_grey_jpeg_with_a_profile_of_colours_stays_grey() -> None:
    grey = read(encoded(picture(mode="L"), "JPEG", icc_profile=display_p3())).pixels(RULE).astype(int)
    assert np.abs(grey - grey[..., :1]).max() <= 2


def test_unusual_jpegs_are_for_the_patient() -> None:
    for name in ("cmyk.jpg", "arithmetic.jpg"):
        data = (SEEDS | CASES)[name]()
        assert read(data).rgb.mode == "RGB"
        with pytest.raises(UnusualJpegError):
            read(data, patient=False)
    with pytest.raises(UndecodableImageError, match="truncated"):
        read(CASES["cut-at-0.5-baseline.jpg"]())


@pytest.mark.parametrize("name", ["exif-entries.png", "exif-entries-in-one.jpg", "exif-entries.webp"])
def test_exif_that_points_to_a_lot_is_not_followed(name: str) -> None:
    header = read_header(CASES[name]())
    assert read(CASES[name]()).rgb.size == (header.width, header.height)


@pytest.mark.parametrize("name", ["rubbish-after-data.png", "empty", "rle8-line.bmp", "no-frame.gif"])
def test_a_file_is_refused_where_serving_refuses_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(CASES[name]())
    with pytest.raises(ValueError, match=r"image is|file begins"):
        read_file(tmp_path / name)
