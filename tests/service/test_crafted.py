"""The crafted files are what their names say."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from camcal.models.preprocessing import Preprocessing
from camcal.service.engine.decoding import Limits, decode
from tests.service.crafted import CASES, SEEDS, webp

RULE = Preprocessing(fit="stretch", resize=8, input_size=8, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))


@pytest.mark.parametrize("name", SEEDS)
def test_seed_is_a_sound_picture_of_its_format(name: str) -> None:
    data = SEEDS[name]()
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        kind = name.rpartition(".")[2].upper()
        assert image.format == {"JPG": "JPEG"}.get(kind, kind)
        assert getattr(image, "is_animated", False) == name.startswith("animated")
    assert decode(data, RULE, Limits(max_bytes=10_000, max_pixels=10_000)).width == 24


@pytest.mark.parametrize("name", ["small-first-frame.gif", "os2.bmp", "bitfields-565.bmp", "exif-endless.jpg"])
def test_harmless_case_is_a_picture(name: str) -> None:
    with Image.open(io.BytesIO(CASES[name]())) as image:
        image.load()


def test_lossless_webp_of_34_bytes_has_the_size_it_promises() -> None:
    data = webp.webp(webp.lossless(3000, 2000))
    assert len(data) < 40
    with Image.open(io.BytesIO(data)) as image:
        assert (image.size, image.getextrema()) == ((3000, 2000), ((0, 0), (0, 0), (0, 0)))
