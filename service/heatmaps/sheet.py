"""One picture that summarises a prediction: the image, both heatmaps of the top class, and that of the runner-up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw

from camcal.service.heatmaps.explanation import Explanation
from camcal.service.heatmaps.heatmap import View, encode, fit, paint, read_picture
from camcal.service.heatmaps.legend import INK, PAPER, SOFT, Caption, builtin_font, shortened

TILE = 384  # longest side of each picture, px
_GAP = 16  # px
_FONT = 17  # px


def sheet(explanation: Explanation, rows: Sequence[dict[str, Any]], name: str) -> bytes:
    """Draw four captioned pictures side by side, as a PNG.

    The calibrated map and that of the runner-up use the same scale: equal colours mean equal contributions.

    Args:
        explanation: the maps of exactly the top two classes.
        rows: the top two of the `predictions`.
        name: the name of the image.
    """
    shape = fit(explanation.picture_size, TILE)
    tiles = [(read_picture(explanation.picture, shape), Caption(title=name, detail="input of the network"))]
    for title, place, calibrated in (("plain", 0, False), ("calibrated", 0, True), ("runner-up", 1, True)):
        scale = explanation.scale(place, calibrated, None, signed=False, common=calibrated)
        contributions = explanation.contributions(place, calibrated)
        heatmap = paint(contributions, scale, explanation.picture, shape, View(size=TILE, window=explanation.window))
        probability = rows[place]["calibrated_probability" if calibrated else "probability"]
        detail = f"{probability:.1%}, {explanation.caption(place, calibrated).detail}"
        tiles.append((heatmap, Caption(title=f"{title}: {explanation.title(place)}", detail=detail)))
    return encode(side_by_side(tiles), "png")


def side_by_side(tiles: Sequence[tuple[Image.Image, Caption]]) -> Image.Image:
    """Place pictures of one size side by side, each above its caption."""
    font = builtin_font(_FONT)
    width, height = tiles[0][0].size
    step = max(width, 16 * _FONT) + _GAP
    canvas = Image.new("RGB", (_GAP + len(tiles) * step, height + 2 * _GAP + 3 * _FONT), PAPER)
    brush = ImageDraw.Draw(canvas)
    for place, (picture, caption) in enumerate(tiles):
        left, top = _GAP + place * step, _GAP + height + _FONT // 2
        canvas.paste(picture, (left, _GAP))
        brush.text((left, top), shortened(caption.title, font, step - _GAP), INK, font)
        brush.text((left, top + round(1.35 * _FONT)), shortened(caption.detail, font, step - _GAP), SOFT, font)
    return canvas
