"""Draw a contribution map as a picture.

Contributions are signed. A `Scale` defines the contributions of the first and the last colour. JSON and npy have the
exact values.
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
from camcal.service.heatmaps.colormaps import COLORMAPS, DEFAULT, Colormap
from camcal.service.heatmaps.legend import Caption, add_legend, room_for_legend
from camcal.service.heatmaps.png import encode_png

Window = tuple[float, float, float, float]
"""Left, top, right and bottom of a picture in a map, in positions from the map's left and upper edge."""

PictureFormat = Literal["png", "webp", "jpeg"]

_FADE_IN = 0.02  # share of the scale over which the colours fade in

_SAVE: dict[PictureFormat, dict[str, int]] = {
    "webp": {"quality": 85, "method": 0},  # method 2 takes 1.6 times as long for files smaller by a quarter
    "jpeg": {"quality": 88},
}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The contributions of the first and the last colour. A signed scale is centred at zero."""

    low: float
    high: float
    signed: bool


@dataclass(frozen=True, kw_only=True)
class View:
    """The options for drawing a heatmap.

    window: where the picture lies in the map. It lies further right and down than the map's edges because of strided
        convolutions, by what `camcal.training.calibration.placement` measures; and within the map if the rest of the
        network's input was filled up. None if the edges of both are the same.
    """

    size: int  # longest side, px
    colormap: Colormap = DEFAULT
    alpha: float = 0.6  # opacity of the strongest colour, in [0, 1]
    overlay: bool = True  # draw on the picture; otherwise the colours only
    format: PictureFormat = "png"
    window: Window | None = None


def positive_scale(maps: NDArray[np.float32]) -> Scale:
    """A scale from a floor to the highest contribution of `maps`. The floor is the median, but at least 0.

    A contribution that most positions share, such as the constant that calibration adds, does not locate anything. The
    scale is empty if no contribution is positive.
    """
    low = max(0.0, float(np.median(maps)))
    return Scale(low=low, high=max(low, float(maps.max())), signed=False)


def signed_scale(maps: NDArray[np.float32]) -> Scale:
    """A symmetric scale around zero, up to the largest absolute contribution of `maps`."""
    limit = float(np.abs(maps).max())
    return Scale(low=-limit, high=limit, signed=True)


def fit(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """Scale width and height `shape` so that the longer one is `size`."""
    scale = size / max(shape)
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def levels(
    contributions: NDArray[np.float32], scale: Scale, size: tuple[int, int], window: Window | None = None
) -> NDArray[np.uint8]:
    """Enlarge an h×w map smoothly, and convert it to indices into a colour table: height×width.

    Args:
        contributions: the map.
        scale: values beyond it get its first or last colour. With an empty scale, all values get the weakest colour.
        size: width and height of the result.
        window: see `View`.
    """
    span = scale.high - scale.low
    if span > 0:
        steps = (contributions.astype(np.float64) - scale.low) * (255 / span)
    else:
        steps = np.full(contributions.shape, 127.0 if scale.signed else 0.0)
    left, top, right, bottom = window or (0, 0, steps.shape[1], steps.shape[0])
    rows = enlargement(steps.shape[0], size[1], top, bottom - top)
    columns = enlargement(steps.shape[1], size[0], left, right - left)
    # einsum instead of @: BLAS would use its own threads, which compete with those of the model.
    enlarged = np.einsum("yi,ix->yx", rows @ (steps + 0.5).astype(np.float32), columns.T.copy())
    indices = np.empty(enlarged.shape, dtype=np.uint8)
    np.clip(enlarged, 0, 255, out=indices, casting="unsafe")
    return indices


@lru_cache(maxsize=64)
def opacities(alpha: float, signed: bool) -> list[int]:
    """The opacity of each of the 256 colours over the picture: stronger contributions are more opaque."""
    if signed:  # both middle levels are zero; a square root would draw a visible line where the sign changes
        strength = (np.abs(np.arange(256) - 127.5) - 0.5) / 127
    else:
        # A square root with a gentle start: a steep start would draw a visible line along the floor.
        strength = np.sqrt(np.linspace(0, 1, 256) + _FADE_IN) - _FADE_IN**0.5
        strength /= strength[-1]
    values: list[int] = (255 * alpha * strength).round().astype(int).tolist()
    return values


def draw(indices: NDArray[np.uint8], colormap: Colormap) -> Image.Image:
    """The colours of a map, without the picture, as a palette image."""
    image = Image.fromarray(indices)
    image.putpalette(COLORMAPS[colormap].tobytes())
    return image


def overlay(picture: Image.Image, indices: NDArray[np.uint8], view: View, signed: bool) -> Image.Image:
    """Draw the map's colours on `picture`, an RGB image of the same size. Changes `picture` in place."""
    mask = Image.fromarray(indices).point(opacities(view.alpha, signed))
    picture.paste(draw(indices, view.colormap).convert("RGB"), mask=mask)
    return picture


def encode(image: Image.Image, format: PictureFormat) -> bytes:
    """Encode an RGB or palette image as a file."""
    if format == "png":
        return encode_png(image)
    buffer = io.BytesIO()
    rgb = image.convert("RGB")
    rgb.info.clear()  # or Pillow would write the comment of the uploaded image
    rgb.save(buffer, format, **_SAVE[format])
    return buffer.getvalue()


def read_picture(picture: bytes, size: tuple[int, int]) -> Image.Image:
    """The JPEG that is stored with the maps, as RGB, resized to width and height `size`."""
    image: Image.Image = Image.open(io.BytesIO(picture), formats=["JPEG"])
    if image.mode != "RGB":  # a grey JPEG that was stored unchanged
        image = image.convert("RGB")
    if image.size == size:
        return image
    # To shrink, or to enlarge slightly, bilinear weights suffice and are faster.
    enlarges = size[0] > 1.25 * image.width
    return image.resize(size, Image.Resampling.BICUBIC if enlarges else Image.Resampling.BILINEAR)


def paint(
    contributions: NDArray[np.float32],
    scale: Scale,
    picture: bytes,
    shape: tuple[int, int],
    view: View,
) -> Image.Image:
    """One heatmap of width and height `shape`, on the picture or without it."""
    indices = levels(contributions, scale, shape, view.window)
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
    """Draw one heatmap as an image file whose longest side is `view.size` px.

    Args:
        contributions: the map, h×w.
        scale: the colour scale.
        picture: JPEG of the part of the image that the network sees.
        picture_size: width and height of the picture; the heatmap has the same aspect ratio.
        view: the drawing options.
        caption: the text of the legend; None for no legend.
    """
    if caption is None:
        return encode(paint(contributions, scale, picture, fit(picture_size, view.size), view), view.format)
    shape = room_for_legend(picture_size, view.size, caption.lines)
    heatmap = paint(contributions, scale, picture, shape, view)
    ends = (scale.low, scale.high)
    return encode(add_legend(heatmap, view.size, caption, COLORMAPS[view.colormap], ends, scale.signed), view.format)
