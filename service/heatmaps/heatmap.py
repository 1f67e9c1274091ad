"""From a contribution map to a picture.

Contributions are signed, and a `Scale` says which of them the colours run between. Exact values are in JSON and npy.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from camcal.models.enlargement import enlargement
from camcal.service.heatmaps.colormaps import COLORMAPS, Colormap
from camcal.service.heatmaps.legend import Caption, add_legend, room_for_legend
from camcal.service.heatmaps.png import encode_png

PictureFormat = Literal["png", "webp", "jpeg"]

_GENTLE = 0.02  # how much of the scale the colours take to come in

_SAVE: dict[PictureFormat, dict[str, int]] = {
    "webp": {"quality": 85, "method": 0},  # method 2 takes 1.6 times as long for a quarter less
    "jpeg": {"quality": 88},
}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The contributions that get the first and the last colour; a signed scale has zero in the middle."""

    low: float
    high: float
    signed: bool


@dataclass(frozen=True, kw_only=True)
class View:
    """How a heatmap is to look.

    shift: by how many positions of its grid the map lies right of and below what it shows; see
        `camcal.training.calibration.placement`. It is drawn that much further left and up.
    """

    size: int  # of the longest side, px
    colormap: Colormap = "turbo"
    alpha: float = 0.6  # how much the strongest colour covers, in [0, 1]
    overlay: bool = True  # on the picture, or the colours alone
    format: PictureFormat = "png"
    shift: float = 0.0


def positive_scale(maps: NDArray[np.float32]) -> Scale:
    """From the floor to the highest contribution of `maps`; the floor is 0, or the median where that is positive.

    Empty where no contribution is positive.

    A share that most positions have, such as the one that calibration adds to all of them, says nothing about the
    place.
    """
    low = max(0.0, float(np.median(maps)))
    return Scale(low=low, high=max(low, float(maps.max())), signed=False)


def signed_scale(maps: NDArray[np.float32]) -> Scale:
    """As far below zero as above it: to the contribution of `maps` that is farthest from zero."""
    limit = float(np.abs(maps).max())
    return Scale(low=-limit, high=limit, signed=True)


def fit(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """Width and height `shape` scaled so that the longer is `size`."""
    scale = size / max(shape)
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def levels(
    contributions: NDArray[np.float32], scale: Scale, size: tuple[int, int], shift: float = 0.0
) -> NDArray[np.uint8]:
    """A map h×w, smoothly enlarged, as indices into a colour table: height×width.

    Args:
        contributions: the map.
        scale: what lies beyond it gets its first or last colour. Where it is empty, nothing is shown.
        size: width and height of the result.
        shift: as in `View`.
    """
    span = scale.high - scale.low
    if span > 0:
        steps = (contributions.astype(np.float64) - scale.low) * (255 / span)
    else:
        steps = np.full(contributions.shape, 127.0 if scale.signed else 0.0)
    rows, columns = enlargement(steps.shape[0], size[1], shift), enlargement(steps.shape[1], size[0], shift)
    # einsum, because a product by BLAS would wake its threads beside those of the model.
    enlarged = np.einsum("yi,ix->yx", rows @ (steps + 0.5).astype(np.float32), columns.T.copy())
    indices = np.empty(enlarged.shape, dtype=np.uint8)
    np.clip(enlarged, 0, 255, out=indices, casting="unsafe")
    return indices


@lru_cache(maxsize=64)
def shares(alpha: float, signed: bool) -> list[int]:
    """How much each of the 256 colours covers of the picture below it: the stronger the evidence, the more."""
    if signed:  # both middle levels stand for zero; a root would draw a line where the sign changes
        strength = (np.abs(np.arange(256) - 127.5) - 0.5) / 127
    else:
        # Nearly a root: one that begins as steeply would draw a line along the floor.
        strength = np.sqrt(np.linspace(0, 1, 256) + _GENTLE) - _GENTLE**0.5
        strength /= strength[-1]
    covered: list[int] = (255 * alpha * strength).round().astype(int).tolist()
    return covered


def draw(indices: NDArray[np.uint8], colormap: Colormap) -> Image.Image:
    """The colours of a map alone, as a picture with a palette."""
    image = Image.fromarray(indices)
    image.putpalette(COLORMAPS[colormap].tobytes())
    return image


def overlay(picture: Image.Image, indices: NDArray[np.uint8], view: View, signed: bool) -> Image.Image:
    """`picture`, RGB and of the map's size, with the map's colours laid on it; no copy is made."""
    mask = Image.fromarray(indices).point(shares(view.alpha, signed))
    picture.paste(draw(indices, view.colormap).convert("RGB"), mask=mask)
    return picture


def encode(image: Image.Image, format: PictureFormat) -> bytes:
    """A picture, RGB or with a palette, as an image file."""
    if format == "png":
        return encode_png(image)
    buffer = io.BytesIO()
    rgb = image.convert("RGB")
    rgb.info.clear()  # Pillow would write the comment of an upload
    rgb.save(buffer, format, **_SAVE[format])
    return buffer.getvalue()


def read_picture(picture: bytes, size: tuple[int, int]) -> Image.Image:
    """The JPEG that is kept beside the maps, RGB, in width and height `size`."""
    image: Image.Image = Image.open(io.BytesIO(picture), formats=["JPEG"])
    if image.mode != "RGB":  # a grey photograph that was kept as it came
        image = image.convert("RGB")
    if image.size == size:
        return image
    # Shrinking, or enlarging by little, needs no more than bilinear weights, and takes less time with them.
    much = size[0] > 1.25 * image.width
    return image.resize(size, Image.Resampling.BICUBIC if much else Image.Resampling.BILINEAR)


def paint(
    contributions: NDArray[np.float32],
    scale: Scale,
    picture: bytes,
    shape: tuple[int, int],
    view: View,
) -> Image.Image:
    """One heatmap of width and height `shape`, with or without the picture below it."""
    indices = levels(contributions, scale, shape, view.shift)
    if not view.overlay:
        return draw(indices, view.colormap)
    return overlay(read_picture(picture, shape), indices, view, scale.signed)


def render(
    contributions: NDArray[np.float32],
    scale: Scale,
    picture: bytes,
    picture_size: tuple[int, int],
    view: View,
    caption: Caption | None = None,
) -> bytes:
    """One heatmap as an image file whose longest side is `view.size` px.

    Args:
        contributions: the map, h×w.
        scale: what its colours stand for.
        picture: JPEG of what the network saw.
        picture_size: width and height of the result are in proportion to it, if there is no legend.
        view: how it is to look.
        caption: what to say in a legend below; None for no legend.
    """
    if caption is None:
        return encode(paint(contributions, scale, picture, fit(picture_size, view.size), view), view.format)
    shape = room_for_legend(picture_size, view.size, caption.lines)
    heatmap = paint(contributions, scale, picture, shape, view)
    ends = (scale.low, scale.high)
    return encode(add_legend(heatmap, view.size, caption, COLORMAPS[view.colormap], ends, scale.signed), view.format)
