"""Words and a colour bar below a heatmap, in Pillow's own font."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

MIN_SIZE = 192  # px; below it nobody could read a legend
_MIN_WIDTH = 240  # px; a narrower heatmap stands in the middle
PAPER, INK, SOFT = (255, 255, 255), (27, 29, 33), (93, 100, 112)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, kw_only=True)
class Caption:
    """What a heatmap shows: at the left a class, which is cut where room ends, at the right its score."""

    title: str
    detail: str


def room_for_legend(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """Width and height in proportion to `shape` such that with a legend below the longest side is `size`."""
    width, height = shape
    room = size - _strip_height(size)
    scale = min(size / width, room / height)
    return max(1, round(width * scale)), max(1, min(room, round(height * scale)))


def add_legend(
    heatmap: Image.Image,
    size: int,
    caption: Caption,
    colours: NDArray[np.uint8],
    ends: tuple[float, float],
    signed: bool,
) -> Image.Image:
    """`heatmap` with a legend below, the longest side `size` px.

    Args:
        heatmap: of the size that `room_for_legend` gave.
        size: at least `MIN_SIZE`.
        caption: the words.
        colours: the colour table, 256×3.
        ends: the contributions of its first and last colour.
        signed: whether its middle is zero.
    """
    wide = heatmap.width == size
    width = max(heatmap.width, min(size, _MIN_WIDTH))
    height = heatmap.height + _strip_height(width) if wide else size
    canvas = Image.new("RGB", (width, height), PAPER)
    canvas.paste(heatmap.convert("RGB"), ((width - heatmap.width) // 2, 0))
    font_px = _font_px(width)
    pad = font_px // 2
    brush = ImageDraw.Draw(canvas)
    top = heatmap.height + pad
    write_caption(brush, (pad, top, width - pad), caption, font_px)
    top += round(1.4 * font_px)
    bar = Image.fromarray(colours[None]).resize((width - 2 * pad, max(4, font_px // 2)), Image.Resampling.BILINEAR)
    canvas.paste(bar, (pad, top))
    _write_ends(brush, (pad, top + bar.height + font_px // 4, width - pad), ends, signed, font_px)
    return canvas


def write_caption(brush: ImageDraw.ImageDraw, box: tuple[int, int, int], caption: Caption, font_px: int) -> None:
    """One line between `box`: left, top, right."""
    left, top, right = box
    font = builtin_font(font_px)
    detail_px = brush.textlength(caption.detail, font)
    brush.text((right, top), caption.detail, SOFT, font, anchor="ra")
    title = shortened(caption.title, font, right - left - detail_px - font_px)
    brush.text((left, top), title, INK, font, anchor="la")


def _write_ends(
    brush: ImageDraw.ImageDraw, box: tuple[int, int, int], ends: tuple[float, float], signed: bool, font_px: int
) -> None:
    left, top, right = box
    font = builtin_font(max(9, round(0.8 * font_px)))
    sign = "+" if signed else ""
    brush.text((left, top), f"{ends[0]:.3g}", SOFT, font, anchor="la")
    brush.text((right, top), f"{sign}{ends[1]:.3g}", SOFT, font, anchor="ra")
    middle = "0" if signed else "a position's share"
    brush.text(((left + right) // 2, top), middle, SOFT, font, anchor="ma")


def shortened(text: str, font: Font, room_px: float) -> str:
    """One line of `text` in the letters that the font has, cut with an ellipsis where it needs more than `room_px`."""
    line = " ".join(latin(text).split())
    if font.getlength(line) <= room_px:
        return line
    while line and font.getlength(f"{line}…") > room_px:
        line = line[:-1]
    return f"{line.rstrip()}…"


# Letters and marks that are no plain one with an accent.
_PLAIN = str.maketrans(
    {"ß": "ss", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d", "Đ": "D"}
    | {"ð": "d", "þ": "th", "ı": "i", "–": "-", "—": "-", "‘": "'", "’": "'", "“": '"', "”": '"'}
)


def latin(text: str) -> str:
    """`text` without accents, and with `?` for each letter that Pillow's font does not have."""
    letters = (c for c in unicodedata.normalize("NFKD", text.translate(_PLAIN)) if not unicodedata.combining(c))
    return "".join(letters).encode("ascii", "replace").decode()


@lru_cache(maxsize=64)
def builtin_font(px: int) -> Font:
    """Pillow's own font."""
    return ImageFont.load_default(px)


def _font_px(width: int) -> int:
    return max(10, width // 28)


def _strip_height(width: int) -> int:
    font_px = _font_px(width)
    return 2 * (font_px // 2) + round(1.4 * font_px) + max(4, font_px // 2) + font_px // 4 + round(0.9 * font_px)
