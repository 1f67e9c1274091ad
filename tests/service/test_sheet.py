from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from models.bundle import Bundle
from service.decoding import Limits, decode
from service.explanation import Explanation, explain
from service.prediction import Ranker
from service.session import Session
from service.sheet import TILE, sheet
from tests.service.conftest import png


@pytest.fixture
def told(bundle: Bundle, session: Session) -> tuple[Explanation, list[dict[str, object]]]:
    ranker = Ranker(bundle.manifest)
    image = decode(png(3), bundle.manifest.preprocessing, Limits(max_bytes=10**6, max_pixels=10**6))
    outputs = session.run(image.pixels[None], top_k=2)
    ranking = ranker.rank(outputs, 0, 2, "balanced")
    return explain(ranker, outputs, 0, ranking, ranking.classes, image, expires_at=0), ranker.rows(ranking)


def test_four_pictures_and_their_captions(told: tuple[Explanation, list[dict[str, object]]]) -> None:
    explanation, rows = told
    with Image.open(io.BytesIO(sheet(explanation, rows, "a.png"))) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    step = (pixels.shape[1] - 16) // 4
    tiles = [pixels[16 : 16 + TILE, 16 + k * step : 16 + k * step + TILE] for k in range(4)]
    captions = [pixels[16 + TILE :, 16 + k * step : 16 + k * step + TILE] for k in range(4)]
    for one in range(4):
        assert (captions[one] < 128).any()  # ink
        for other in range(one):
            assert (captions[one] != captions[other]).any()
    plain, calibrated, runner_up = (np.abs(heatmap - tiles[0]).max() for heatmap in tiles[1:])
    assert min(plain, calibrated) > 60  # colours on the image
    assert runner_up < calibrated  # its score is far lower


def test_runner_up_shares_the_scale_of_the_best(told: tuple[Explanation, list[dict[str, object]]]) -> None:
    explanation, _ = told
    best, second = (explanation.scale(place, True, None, signed=False, common=True) for place in range(2))
    assert best == second
