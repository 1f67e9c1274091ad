import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from camcal.models.preprocessing import Preprocessing

STATS = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}


def _rule(fit: str, resize: int, input_size: int) -> Preprocessing:
    return Preprocessing.model_validate({"fit": fit, "resize": resize, "input_size": input_size, **STATS})


def _gradient(width: int, height: int) -> Image.Image:
    x = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    y = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))


def test_an_image_of_the_right_size_is_left_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(_rule("crop", 32, 32).apply(Image.fromarray(pixels)), pixels)


def test_crop_keeps_the_central_square() -> None:
    out = _rule("crop", 50, 50).apply(_gradient(200, 100))
    assert out.shape == (50, 50, 3)
    assert abs(int(out[0, 0, 0]) - 64) < 4 and abs(int(out[0, -1, 0]) - 191) < 4
    assert out[0, 0, 1] < 6 and out[-1, 0, 1] > 249


def test_stretch_keeps_everything() -> None:
    out = _rule("stretch", 50, 50).apply(_gradient(200, 100))
    assert out[0, 0, 0] < 6 and out[0, -1, 0] > 249


@pytest.mark.parametrize(("size", "place"), [((200, 100), (0, 12, 50, 37)), ((101, 200), (12, 0, 37, 50))])
def test_letterbox_keeps_everything_and_the_ratio(size: tuple[int, int], place: tuple[int, int, int, int]) -> None:
    rule = _rule("letterbox", 50, 50).model_copy(update={"mean": (0.5, 0.4, 0.2)})
    image = _gradient(*size)
    assert rule.place(*size) == place and rule.box(*size) == (0, 0, *size)
    left, top, right, bottom = place
    out = rule.apply(image)
    seen = image.resize((right - left, bottom - top), rule.resampling)
    assert np.array_equal(out[top:bottom, left:right], np.asarray(seen))
    out[top:bottom, left:right] = (128, 102, 51)
    assert (out == (128, 102, 51)).all()  # the mean, 0 to the network
    assert abs(out.mean(axis=(0, 1)) / 255 - rule.mean).max() < 0.5 / 255


def test_letterbox_places_a_reduced_picture_where_the_whole_one_would_lie() -> None:
    rule, image = _rule("letterbox", 100, 100), _gradient(804, 330)
    assert rule.place(804, 330) != rule.place(101, 42)
    reduced = image.resize((101, 42))
    difference = rule.apply(reduced, image.size).astype(int) - rule.apply(image)
    assert np.abs(difference).max() < 6


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000), (50, 50)])
def test_letterbox_of_extreme_shapes(size: tuple[int, int]) -> None:
    left, top, right, bottom = _rule("letterbox", 50, 50).place(*size)
    assert 0 <= left < right <= 50 and 0 <= top < bottom <= 50
    assert max(right - left, bottom - top) == 50


def test_a_letterbox_cannot_be_cropped() -> None:
    with pytest.raises(ValidationError, match="letterbox shows the whole picture: input_size must be resize, got 90"):
        _rule("letterbox", 100, 90)


@pytest.mark.parametrize(
    ("fit", "expected"), [("crop", (55.0, 5.0, 145.0, 95.0)), ("stretch", (10.0, 5.0, 190.0, 95.0))]
)
def test_box_is_the_part_that_is_seen(fit: str, expected: tuple[float, ...]) -> None:
    assert _rule(fit, 100, 90).box(200, 100) == pytest.approx(expected)


def test_other_modes_are_refused() -> None:
    with pytest.raises(ValueError, match="expected an RGB image, got mode L"):
        _rule("crop", 8, 8).apply(Image.new("L", (8, 8)))


def test_an_input_larger_than_its_resize_is_refused() -> None:
    with pytest.raises(ValidationError, match="input_size 64 is larger than resize 32"):
        _rule("crop", 32, 64)
