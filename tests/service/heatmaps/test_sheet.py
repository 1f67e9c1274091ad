from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from camcal.models.bundle import Bundle
from camcal.service.engine.decoding import Limits, decode
from camcal.service.engine.ranking import Ranker, explain
from camcal.service.engine.session import Session
from camcal.service.heatmaps.explanation import Explanation
from camcal.service.heatmaps.legend import builtin_font
from camcal.service.heatmaps.sheet import TILE, sheet
from tests.service.conftest import png

Explained = tuple[Explanation, list[dict[str, object]]]


@pytest.fixture
def explained(bundle: Bundle, session: Session) -> Explained:
    return _explain(bundle, session, png(3))


def _explain(bundle: Bundle, session: Session, image_file: bytes) -> Explained:
    ranker = Ranker(bundle.manifest)
    image = decode(image_file, bundle.manifest.preprocessing, Limits(max_bytes=10**6, max_pixels=10**6))
    outputs = session.run(image.pixels[None], top_k=2)
    ranking = ranker.rank(outputs, 0, 2, "balanced")
    return explain(ranker, outputs, 0, ranking, ranking.classes, image, expires_at=0), ranker.rows(ranking)


def test_four_pictures_and_their_captions(explained: Explained) -> None:
    explanation, rows = explained
    with Image.open(io.BytesIO(sheet(explanation, rows, "a.png"))) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    step = (pixels.shape[1] - 16) // 4
    tiles = [pixels[16 : 16 + TILE, 16 + k * step : 16 + k * step + TILE] for k in range(4)]
    captions = [pixels[16 + TILE :, 16 + k * step : 16 + k * step + TILE] for k in range(4)]
    for one in range(4):
        assert (captions[one] < 128).any()  # text
        for other in range(one):
            assert (captions[one] != captions[other]).any()
    plain, calibrated, runner_up = (np.abs(heatmap - tiles[0]).max() for heatmap in tiles[1:])
    assert min(plain, calibrated) > 60  # colours on the image
    assert runner_up < calibrated  # its score is much lower


def test_caption_fits_below_a_narrow_picture(bundle: Bundle, session: Session) -> None:
    explanation, rows = _explain(bundle, session, png(3, (90, 160)))
    explanation = replace(explanation, picture_size=(90, 160))
    with Image.open(io.BytesIO(sheet(explanation, rows, "a.png"))) as image:
        width = (image.width - 16) // 4 - 16
    assert builtin_font(17).getlength("100.0%, calibrated score -88.88") <= width


def test_runner_up_has_the_scale_of_the_top_class(explained: Explained) -> None:
    explanation, _ = explained
    best, second = (explanation.scale(place, True, None, signed=False, common=True) for place in range(2))
    assert best == second
