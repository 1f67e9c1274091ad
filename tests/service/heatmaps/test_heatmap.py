from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from camcal.service.heatmaps.colormaps import COLORMAPS
from camcal.service.heatmaps.heatmap import (
    PictureFormat,
    Scale,
    View,
    draw,
    encode,
    fit,
    levels,
    opacities,
    overlay,
    positive_scale,
    render,
    signed_scale,
)
from camcal.service.heatmaps.legend import Caption
from tests.service.conftest import encoded, picture

Map = NDArray[np.float32]


def random_map(seed: int = 0, shape: tuple[int, int] = (7, 7)) -> Map:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("table", COLORMAPS.values(), ids=COLORMAPS)
def test_colormaps_are_smooth(table: NDArray[np.uint8]) -> None:
    assert table.shape == (256, 3)
    assert table.dtype == np.uint8
    assert np.abs(np.diff(table.astype(int), axis=0)).max() <= 16


def test_known_colours() -> None:
    # From matplotlib's tables.
    assert COLORMAPS["viridis"][[0, 255]].tolist() == [[0x44, 0x01, 0x54], [0xFD, 0xE7, 0x25]]
    assert COLORMAPS["turbo"][60].tolist() == [0x2F, 0xB2, 0xF4]
    assert COLORMAPS["magma"][120].tolist() == [0xAA, 0x33, 0x7D]
    assert COLORMAPS["inferno"][195].tolist() == [0xFA, 0x94, 0x07]
    assert COLORMAPS["gray"][100].tolist() == [100, 100, 100]


def test_coolwarm_is_neutral_in_the_middle_and_diverges() -> None:
    low, middle, high = COLORMAPS["coolwarm"][[0, 127, 255]].astype(int)
    assert middle.max() - middle.min() <= 4
    assert low.argmax() == 2
    assert high.argmax() == 0


@pytest.mark.parametrize(
    ("shape", "expected"), [((400, 300), (200, 150)), ((300, 400), (150, 200)), ((1, 4000), (1, 200))]
)
def test_fit(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fit(shape, 200) == expected


def test_positive_scale_starts_at_zero_or_at_a_positive_median() -> None:
    contributions = np.array([[-1.0, -2.0], [-3.0, 4.0]], dtype=np.float32)
    assert positive_scale(contributions) == Scale(low=0.0, high=4.0, signed=False)
    assert positive_scale(contributions + 10) == Scale(low=8.5, high=14.0, signed=False)
    assert positive_scale(contributions - 10) == Scale(low=0.0, high=0.0, signed=False)


def test_signed_scale_has_zero_in_the_middle() -> None:
    assert signed_scale(np.array([[-3.0, 2.0]], dtype=np.float32)) == Scale(low=-3.0, high=3.0, signed=True)


def test_levels_run_from_the_floor_to_the_highest() -> None:
    contributions = np.full((7, 7), -3.0, dtype=np.float32)
    contributions[1, 5] = 4.0
    indices = levels(contributions, positive_scale(contributions), (70, 140))
    assert indices.shape == (140, 70)
    assert np.unravel_index(indices.argmax(), indices.shape) == pytest.approx((30, 55), abs=2)
    assert indices.max() >= 250
    assert indices[100:].max() == 0


@pytest.mark.parametrize("size", [(64, 48), (7, 7), (16, 16), (333, 5)])
def test_enlarging_keeps_values_and_means(size: tuple[int, int]) -> None:
    scale = Scale(low=0.0, high=255.0, signed=False)
    flat = np.full((7, 9), 100.0, dtype=np.float32)
    assert set(np.unique(levels(flat, scale, size))) <= {99, 100}  # rounding error of the sum of weights
    ramp = np.tile(np.arange(9, dtype=np.float32) * 20 + 40, (7, 1))
    enlarged = levels(ramp, scale, (90, 70))[35, 15:75].astype(float)
    np.testing.assert_allclose(enlarged, 40 + 20 * ((np.arange(15, 75) + 0.5) / 10 - 0.5), atol=0.6)


def test_same_size_is_the_map_itself() -> None:
    contributions = np.random.default_rng(0).integers(0, 256, size=(5, 6)).astype(np.float32)
    indices = levels(contributions, Scale(low=0.0, high=255.0, signed=False), (6, 5))
    np.testing.assert_array_equal(indices, contributions)


def test_even_share_is_not_coloured() -> None:
    contributions = random_map()
    raised = levels(contributions + 100, positive_scale(contributions + 100), (70, 70))
    assert np.median(raised) < 51
    assert raised.max() > 230


@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_nothing_positive_shows_nothing(value: float) -> None:
    contributions = np.full((4, 4), value, dtype=np.float32)
    indices = levels(contributions, positive_scale(contributions), (16, 16))
    assert indices.max() == 0
    photo = picture(size=(16, 16))
    laid = overlay(photo.copy(), indices, View(size=16, alpha=1.0), signed=False)
    np.testing.assert_array_equal(np.asarray(laid), np.asarray(photo))


def test_zero_shows_nothing_when_signed() -> None:
    nothing = levels(np.zeros((4, 4), dtype=np.float32), Scale(low=0.0, high=0.0, signed=True), (16, 16))
    assert set(np.unique(nothing)) <= {127, 128}
    photo = picture(size=(16, 16))
    laid = overlay(photo.copy(), nothing, View(size=16, alpha=1.0, colormap="coolwarm"), signed=True)
    np.testing.assert_array_equal(np.asarray(laid), np.asarray(photo))


def test_signed_colours_what_speaks_against_too() -> None:
    contributions = np.array([[-2.0, 2.0]], dtype=np.float32)
    indices = levels(contributions, signed_scale(contributions), (20, 10))
    colours = np.asarray(draw(indices, "coolwarm").convert("RGB"))
    assert colours[5, 0].argmax() == 2  # blue: against
    assert colours[5, -1].argmax() == 0  # red: for
    rising = opacities(1.0, signed=False)
    assert rising[0] == 0 and rising[-1] == 255 and rising == sorted(rising)
    assert max(b - a for a, b in pairwise(rising)) <= 4  # no line along the floor
    assert opacities(0.5, signed=True)[0] == opacities(0.5, signed=True)[255] == 128


def test_overlay_covers_where_the_evidence_is() -> None:
    indices = np.array([[255, 0], [0, 64]], dtype=np.uint8)
    mixed = np.asarray(overlay(Image.new("RGB", (2, 2)), indices, View(size=2, colormap="gray", alpha=0.5), False))
    assert mixed[0, 0].tolist() == [128, 128, 128]
    assert mixed[1, 0].tolist() == [0, 0, 0]
    share = (np.sqrt(64 / 255 + 0.02) - np.sqrt(0.02)) / (np.sqrt(1.02) - np.sqrt(0.02))
    assert mixed[1, 1].tolist() == pytest.approx([64 * share * 0.5] * 3, abs=1)


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
@pytest.mark.parametrize("on_picture", [True, False])
@pytest.mark.parametrize("caption", [None, Caption(title="red fox", detail="plain score 3.21")])
def test_render(format: PictureFormat, on_picture: bool, caption: Caption | None) -> None:
    contributions = random_map(shape=(4, 4))
    data = render(
        contributions,
        positive_scale(contributions),
        encoded(picture(size=(80, 40)), "JPEG"),
        (80, 40),
        View(size=256, colormap="viridis", alpha=0.5, overlay=on_picture, format=format),
        caption,
    )
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == format.upper()
        assert image.width == 256
        assert (image.height == 128) is (caption is None)
        image.load()


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
@pytest.mark.parametrize("size", [80, 256])
def test_heatmaps_have_no_metadata_of_the_uploaded_image(format: PictureFormat, size: int) -> None:
    exif = Image.Exif()
    exif[0x010E] = "SECRET description"
    uploaded = encoded(picture(size=(80, 40)), "JPEG", comment=b"SECRET comment", exif=exif, icc_profile=b"SECRET icc")
    assert uploaded.count(b"SECRET") == 3
    contributions = random_map()
    view = View(size=size, format=format)
    data = render(contributions, positive_scale(contributions), uploaded, (80, 40), view)
    assert b"SECRET" not in data
    with Image.open(io.BytesIO(data)) as image:
        assert not {"comment", "exif", "icc_profile", "xmp"} & image.info.keys()


def test_webp_and_jpeg_look_like_the_png() -> None:
    image = picture(size=(64, 48))
    for format in ("webp", "jpeg"):
        with Image.open(io.BytesIO(encode(image, format))) as again:
            difference = np.abs(np.asarray(again.convert("RGB")).astype(int) - np.asarray(image))
        assert difference.mean() < 4


def test_a_window_shows_its_part_of_the_map() -> None:
    contributions = np.random.default_rng(0).uniform(50, 200, size=(8, 8)).astype(np.float32)
    scale = Scale(low=0.0, high=255.0, signed=False)
    whole = levels(contributions, scale, (80, 80)).astype(int)
    part = levels(contributions, scale, (80, 40), (0.0, 2.0, 8.0, 6.0))
    assert np.abs(part - whole[20:60]).max() <= 1
    moved = levels(contributions, scale, (80, 80), (0.5, 0.5, 8.5, 8.5))
    assert np.abs(moved[:75, :75] - whole[5:, 5:]).max() <= 1
