from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from camcal.service.heatmaps.png import encode_png
from tests.service.conftest import picture


@pytest.mark.parametrize("size", [(60, 40), (1, 1), (1, 300), (300, 1), (257, 3)])
def test_pixels_are_unchanged(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, size=(size[1], size[0], 3), dtype=np.uint8)
    for pixels in (noise, np.asarray(picture(size=size)), np.zeros_like(noise)):
        with Image.open(io.BytesIO(encode_png(Image.fromarray(pixels)))) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", size)
            np.testing.assert_array_equal(np.asarray(image), pixels)


def test_palette_is_unchanged() -> None:
    indices = np.arange(256, dtype=np.uint8).reshape(8, 32)
    palette = np.random.default_rng(0).integers(0, 256, size=(256, 3), dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    with Image.open(io.BytesIO(encode_png(image))) as again:
        assert again.mode == "P"
        np.testing.assert_array_equal(np.asarray(again.convert("RGB")), palette[indices])


def test_checksums_are_correct() -> None:
    data = encode_png(picture())
    at, kinds = 8, []
    while at < len(data):
        length = int.from_bytes(data[at : at + 4])
        body = data[at + 4 : at + 8 + length]
        kinds.append(body[:4])
        assert int.from_bytes(data[at + 8 + length : at + 12 + length]) == zlib.crc32(body)
        at += 12 + length
    assert kinds == [b"IHDR", b"IDAT", b"IEND"]


def test_other_modes_are_refused() -> None:
    with pytest.raises(ValueError, match="expected an image of mode RGB or P, got L"):
        encode_png(picture(mode="L"))
