"""One picture that tells the whole of a prediction: the image, both maps of its class, and that of the runner-up."""

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
    """A PNG with four pictures in a row, and a caption below each.

    The calibrated map and the runner-up's share their colours: equal colours mean equal contributions.

    Args:
        explanation: holds the maps of the two best classes, and of no other.
        rows: the two best of the `predictions`.
        name: of the image.
    """
    shape = fit(explanation.picture_size, TILE)
    tiles = [(read_picture(explanation.picture, shape), Caption(title=name, detail="what the network sees"))]
    for title, place, calibrated in (("plain", 0, False), ("calibrated", 0, True), ("runner-up", 1, True)):
        scale = explanation.scale(place, calibrated, None, signed=False, common=calibrated)
        contributions = explanation.contributions(place, calibrated)
        heatmap = paint(contributions, scale, explanation.picture, shape, View(size=TILE, shift=explanation.shift))
        share = rows[place]["calibrated_probability" if calibrated else "probability"]
        detail = f"{share:.1%}, {explanation.caption(place, calibrated).detail}"
        tiles.append((heatmap, Caption(title=f"{title}: {explanation.title(place)}", detail=detail)))
    return encode(side_by_side(tiles), "png")


def side_by_side(tiles: Sequence[tuple[Image.Image, Caption]]) -> Image.Image:
    """Pictures of one size side by side, each above its caption."""
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
