from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from camcal.service.heatmaps.colormaps import COLORMAPS
from camcal.service.heatmaps.legend import (
    MIN_SIZE,
    PAPER,
    Caption,
    add_legend,
    builtin_font,
    comparison,
    latin,
    legible,
    room_for_legend,
    shortened,
)

CAPTION = Caption(title="red fox", detail="plain score 3.21")
CONTRAST = Caption(title="red fox", detail="plain difference 3.21", rival="dog")


def with_legend(shape: tuple[int, int], size: int, caption: Caption = CAPTION, signed: bool = False) -> Image.Image:
    room = room_for_legend(shape, size, caption.lines)
    heatmap = Image.new("RGB", room, (0, 255, 0))
    return add_legend(heatmap, size, caption, COLORMAPS["turbo"], (-2.0, 2.0), signed)


@pytest.mark.parametrize("shape", [(400, 300), (300, 400), (50, 50), (1, 4000), (4000, 1), (1000, 870)])
@pytest.mark.parametrize("size", [MIN_SIZE, 193, 384, 1024])
@pytest.mark.parametrize("caption", [CAPTION, CONTRAST])
def test_longest_side_is_the_size(shape: tuple[int, int], size: int, caption: Caption) -> None:
    image = with_legend(shape, size, caption)
    assert max(image.size) == size
    green = Image.fromarray((np.asarray(image) == (0, 255, 0)).all(axis=2))
    left, top, right, bottom = green.getbbox() or (0, 0, 0, 0)
    width, height = room_for_legend(shape, size, caption.lines)
    assert (right - left, bottom - top) == (width, height)
    assert width / height == pytest.approx(shape[0] / shape[1], rel=0.02) or min(width, height) == 1


@pytest.mark.parametrize("shape", [(400, 300), (300, 400), (50, 50), (1000, 870), (200, 400)])
@pytest.mark.parametrize("size", [MIN_SIZE, 384, 512, 1024])
@pytest.mark.parametrize("caption", [CAPTION, CONTRAST])
def test_no_blank_rows_below_the_legend(shape: tuple[int, int], size: int, caption: Caption) -> None:
    written = (np.asarray(with_legend(shape, size, caption)) != PAPER).any(axis=(1, 2))
    blank = written[::-1].argmax()
    assert 0 < blank <= size / 30


def test_text_and_bar_are_below_the_heatmap() -> None:
    image = with_legend((400, 300), 400)
    strip = np.asarray(image)[300:]
    rows = (strip != PAPER).any(axis=(1, 2))
    assert rows.any()
    bar = [row for row in strip if (row[10:-10] != PAPER).any(axis=1).all()]
    assert bar  # a continuous line of colours
    np.testing.assert_allclose(bar[0][12], COLORMAPS["turbo"][0], atol=40)
    np.testing.assert_allclose(bar[0][-12], COLORMAPS["turbo"][255], atol=40)


def test_different_captions_give_different_legends() -> None:
    drawn = {
        with_legend((400, 300), 400, caption, signed).tobytes()
        for caption in (
            CAPTION,
            Caption(title="red fox", detail="plain score 3.22"),
            Caption(title="dog", detail=""),
            CONTRAST,
            Caption(title="red fox", detail="plain difference 3.21", rival="cat"),
        )
        for signed in (False, True)
    }
    assert len(drawn) == 10


def test_long_titles_are_cut() -> None:
    font = builtin_font(12)
    assert shortened("red  fox\n", font, 200) == "red fox"
    cut = shortened("a very long name of a class", font, 60)
    assert cut.endswith("…")
    assert font.getlength(cut) <= 60
    assert shortened("red fox", font, -5) == "…"


def test_comparison_names_both_classes() -> None:
    font = builtin_font(12)
    assert comparison("red  fox", "dog\n", font, 200) == "red fox rather than dog"
    long = "a very long name of a class"
    for title, rival, start, end in (
        (long, long, "a very", "…"),
        ("ox", long, "ox rather than a very long", "…"),
        (long, "ox", "a very long", "… rather than ox"),
    ):
        line = comparison(title, rival, font, 190)
        assert font.getlength(line) <= 190
        assert " rather than " in line
        assert line.startswith(start)
        assert line.endswith(end)


def test_letters_that_are_not_in_the_font() -> None:
    assert latin("Löwe, café") == "Lowe, cafe"
    assert latin("狐 fox") == "? fox"
    assert latin("straße, łódź – “Ærø”") == 'strasse, lodz - "AEro"'
    assert latin("Þór, Ðað, ẞ, Ħal, 3×4") == "Thor, Dad, SS, Hal, 3x4"
    assert [legible(label, 44) for label in ("帆船", "مركب", "狐 fox", "4")] == ["class 44", "class 44", "狐 fox", "4"]
    with_legend((400, 300), 400, Caption(title="狐\u202e\x00", detail=""))
