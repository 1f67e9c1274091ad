from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from service.colormaps import COLORMAPS
from service.heatmap import PictureFormat, draw, encode, fit, intensity, overlay, render
from tests.service.conftest import encoded, picture


@pytest.mark.parametrize("table", COLORMAPS.values(), ids=COLORMAPS)
def test_colormaps_are_smooth(table: np.ndarray[tuple[int, int], np.dtype[np.uint8]]) -> None:
    assert table.shape == (256, 3)
    assert table.dtype == np.uint8
    assert np.abs(np.diff(table.astype(int), axis=0)).max() <= 16


def test_known_colours() -> None:
    assert COLORMAPS["viridis"][[0, 255]].tolist() == [[0x44, 0x01, 0x54], [0xFD, 0xE7, 0x25]]
    assert COLORMAPS["gray"][100].tolist() == [100, 100, 100]
    assert COLORMAPS["turbo"][128].argmax() == 1  # green in the middle


@pytest.mark.parametrize(
    ("shape", "expected"), [((400, 300), (200, 150)), ((300, 400), (150, 200)), ((1, 4000), (1, 200))]
)
def test_fit(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fit(shape, 200) == expected


def test_intensity_runs_from_nothing_to_the_highest() -> None:
    contributions = np.full((7, 7), -3.0, dtype=np.float32)
    contributions[1, 5] = 4.0
    values = intensity(contributions, (70, 140))
    assert values.shape == (140, 70)
    assert np.unravel_index(values.argmax(), values.shape) == pytest.approx((30, 55), abs=10)
    assert values.max() > 0.9
    assert values[100:].max() == 0


def test_even_share_is_not_coloured() -> None:
    contributions = np.random.default_rng(0).normal(size=(7, 7)).astype(np.float32)
    raised = intensity(contributions + 100, (70, 70))
    assert np.median(raised) < 0.2
    assert raised.max() > 0.9


def test_nothing_positive_shows_nothing() -> None:
    values = intensity(np.full((4, 4), -1.0, dtype=np.float32), (16, 16))
    assert values.max() == 0
    photo = picture(size=(16, 16))
    np.testing.assert_array_equal(overlay(photo, values, "turbo", 1.0), np.asarray(photo))


def test_overlay_covers_where_the_evidence_is() -> None:
    values = np.zeros((2, 2), dtype=np.float32)
    values[0, 0] = 1
    black = Image.new("RGB", (2, 2))
    mixed = overlay(black, values, "gray", alpha=0.5)
    assert mixed[0, 0].tolist() == [128, 128, 128]
    assert mixed[1, 1].tolist() == [0, 0, 0]


def test_draw() -> None:
    assert draw(np.array([[0.0, 1.0]], dtype=np.float32), "gray").tolist() == [[[0, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
@pytest.mark.parametrize("on_picture", [True, False])
def test_render(format: PictureFormat, on_picture: bool) -> None:
    contributions = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    data = render(
        contributions,
        encoded(picture(size=(80, 40)), "JPEG"),
        (80, 40),
        size=64,
        colormap="viridis",
        alpha=0.5,
        on_picture=on_picture,
        format=format,
    )
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == (format.upper(), (64, 32))


def test_png_keeps_every_pixel() -> None:
    pixels = np.asarray(picture())
    with Image.open(io.BytesIO(encode(pixels, "png"))) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
