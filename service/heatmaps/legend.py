"""The legend of a heatmap: text and a colour bar below it, in Pillow's built-in font."""

from __future__ import annotations

import unicodedata
from bisect import bisect
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

MIN_SIZE = 192  # px; a smaller legend would be illegible
_MIN_WIDTH = 240  # px; a narrower heatmap is centred
PAPER, INK, SOFT = (255, 255, 255), (27, 29, 33), (93, 100, 112)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, kw_only=True)
class Caption:
    """The text of a legend: the class, its score, and optionally the class that it is compared with."""

    title: str
    detail: str
    rival: str | None = None

    @property
    def lines(self) -> int:
        """Number of lines: two with a rival, because both names fill the first."""
        return 1 if self.rival is None else 2


def room_for_legend(shape: tuple[int, int], size: int, lines: int) -> tuple[int, int]:
    """Width and height of a heatmap with the aspect ratio of `shape`, so that it fits into `size` with its legend."""

    def height(width: int) -> int:
        return round(width * shape[1] / shape[0])

    def strip(width: int) -> int:
        return _strip_height(_legend_width(width, size), lines)

    width = max(1, bisect(range(1, size + 1), size, key=lambda width: height(width) + strip(width)))
    return width, max(1, min(size - strip(width), height(width)))


def add_legend(
    heatmap: Image.Image,
    size: int,
    caption: Caption,
    colours: NDArray[np.uint8],
    ends: tuple[float, float],
    signed: bool,
) -> Image.Image:
    """Add a legend below `heatmap`. The longest side of the result is `size` px.

    Args:
        heatmap: a heatmap of the size from `room_for_legend`.
        size: at least `MIN_SIZE`.
        caption: the text.
        colours: the colour table, 256×3.
        ends: the contributions of the first and the last colour.
        signed: whether the scale is centred at zero.
    """
    wide = heatmap.width == size
    width = _legend_width(heatmap.width, size)
    height = heatmap.height + _strip_height(width, caption.lines) if wide else size
    canvas = Image.new("RGB", (width, height), PAPER)
    canvas.paste(heatmap.convert("RGB"), ((width - heatmap.width) // 2, 0))
    font_px = _font_px(width)
    pad = font_px // 2
    brush = ImageDraw.Draw(canvas)
    top = heatmap.height + pad
    _write_caption(brush, (pad, top, width - pad), caption, font_px)
    top += caption.lines * _line_height(font_px)
    bar = Image.fromarray(colours[None]).resize((width - 2 * pad, max(4, font_px // 2)), Image.Resampling.BILINEAR)
    canvas.paste(bar, (pad, top))
    _write_ends(brush, (pad, top + bar.height + font_px // 4, width - pad), ends, signed, font_px)
    return canvas


def _write_caption(brush: ImageDraw.ImageDraw, box: tuple[int, int, int], caption: Caption, font_px: int) -> None:
    """Write the caption into `box`: left, top, right."""
    left, top, right = box
    font = builtin_font(font_px)
    if caption.rival is None:
        detail_px = brush.textlength(caption.detail, font)
        title = shortened(caption.title, font, right - left - detail_px - font_px)
        brush.text((right, top), caption.detail, SOFT, font, anchor="ra")
    else:
        title = comparison(caption.title, caption.rival, font, right - left)
        brush.text((left, top + _line_height(font_px)), caption.detail, SOFT, font, anchor="la")
    brush.text((left, top), title, INK, font, anchor="la")


def _write_ends(
    brush: ImageDraw.ImageDraw, box: tuple[int, int, int], ends: tuple[float, float], signed: bool, font_px: int
) -> None:
    left, top, right = box
    font = builtin_font(max(9, round(0.8 * font_px)))
    sign = "+" if signed else ""
    brush.text((left, top), f"{ends[0]:.3g}", SOFT, font, anchor="la")
    brush.text((right, top), f"{sign}{ends[1]:.3g}", SOFT, font, anchor="ra")
    middle = "0" if signed else "contribution per position"
    brush.text(((left + right) // 2, top), middle, SOFT, font, anchor="ma")


def shortened(text: str, font: Font, room_px: float) -> str:
    """`text` as one line in letters of the font, cut with an ellipsis if it is wider than `room_px`."""
    line = _line(text)
    if font.getlength(line) <= room_px:
        return line
    while line and font.getlength(f"{line}…") > room_px:
        line = line[:-1]
    return f"{line.rstrip()}…"


def comparison(title: str, rival: str, font: Font, room_px: float) -> str:
    """Both names in one line. If they do not fit, the longer one is cut first."""
    words = " rather than "
    room_px -= font.getlength(words)
    title_px, rival_px = (font.getlength(_line(name)) for name in (title, rival))
    half = room_px / 2
    shown = shortened(title, font, max(half, room_px - rival_px)), shortened(rival, font, max(half, room_px - title_px))
    return words.join(shown)


def _line(text: str) -> str:
    return " ".join(latin(text).split())


# Letters and marks that do not decompose into an ASCII letter and an accent.
_PLAIN = str.maketrans(
    {"ß": "ss", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d", "Đ": "D"}
    | {"ð": "d", "Ð": "D", "þ": "th", "Þ": "Th", "ħ": "h", "Ħ": "H", "ŧ": "t", "Ŧ": "T", "ŋ": "n", "Ŋ": "N", "ı": "i"}
    | {"ẞ": "SS", "×": "x", "–": "-", "—": "-", "‘": "'", "’": "'", "“": '"', "”": '"'}
)


def legible(label: str, class_id: int) -> str:
    """`label`, or the class's number if the font has none of the label's letters."""
    return label if any(c.isalnum() for c in latin(label)) else f"class {class_id}"


def latin(text: str) -> str:
    """`text` without accents, and with `?` for each letter that is not in the font."""
    letters = (c for c in unicodedata.normalize("NFKD", text.translate(_PLAIN)) if not unicodedata.combining(c))
    return "".join(letters).encode("ascii", "replace").decode()


@lru_cache(maxsize=64)
def builtin_font(px: int) -> Font:
    """Pillow's built-in font."""
    return ImageFont.load_default(px)


def _font_px(width: int) -> int:
    return max(10, width // 28)


def _line_height(font_px: int) -> int:
    return round(1.4 * font_px)


def _legend_width(width: int, size: int) -> int:
    return max(width, min(size, _MIN_WIDTH))


def _strip_height(width: int, lines: int) -> int:
    font_px = _font_px(width)
    bar = max(4, font_px // 2)
    return 2 * (font_px // 2) + lines * _line_height(font_px) + bar + font_px // 4 + round(0.9 * font_px)
