from __future__ import annotations

import numpy as np
import pytest

from models.bundle import Bundle
from service.explanation import Explanation, marc_map, offsets


@pytest.fixture
def explanation() -> Explanation:
    maps = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    logits = maps.sum(axis=(1, 2), dtype=np.float64)
    return Explanation(
        expires_at=1234.5,
        classes=[7, 2],
        labels=["red\nfox", "Löwe"],
        logits=logits.tolist(),
        calibrated_logits=(logits * [1.5, 0.5] + [3, -4]).tolist(),
        scales=[1.5, 0.5],
        offsets=[3.0, -4.0],
        picture_size=(40, 30),
        picture=b"\xff\xd8\n\xff",
        maps=maps,
    )


def test_pack_and_unpack(explanation: Explanation) -> None:
    again = Explanation.unpack(explanation.pack())
    np.testing.assert_array_equal(again.maps, explanation.maps)
    kept = {name: value for name, value in vars(explanation).items() if name != "maps"}
    assert {name: value for name, value in vars(again).items() if name != "maps"} == kept


@pytest.mark.parametrize("calibrated", [True, False])
def test_contributions_sum_to_the_score(explanation: Explanation, calibrated: bool) -> None:
    for place in range(2):
        total = explanation.contributions(place, calibrated).sum(dtype=np.float64)
        assert total == pytest.approx(explanation.score(place, calibrated), rel=1e-5)


def test_marc_map_by_hand() -> None:
    plain = np.array([[1.0, 2.0], [3.0, -1.0]], dtype=np.float32)
    np.testing.assert_allclose(marc_map(plain, omega=2.0, offset=4.0), [[3, 5], [7, -1]])


def test_offsets(bundle: Bundle) -> None:
    calibration = bundle.manifest.calibration
    assert offsets(calibration, [4, 1]) == [calibration.beta[k] * calibration.weight_norms[k] for k in (4, 1)]
