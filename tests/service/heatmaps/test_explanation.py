from __future__ import annotations

import numpy as np
import pytest

from camcal.models.bundle import Bundle
from camcal.service.heatmaps.explanation import Explanation, marc_map, offsets
from camcal.service.heatmaps.heatmap import positive_scale, signed_scale


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
    others = {name: value for name, value in vars(explanation).items() if name != "maps"}
    assert {name: value for name, value in vars(again).items() if name != "maps"} == others


@pytest.mark.parametrize("calibrated", [True, False])
def test_contributions_sum_to_the_score(explanation: Explanation, calibrated: bool) -> None:
    for place in range(2):
        total = explanation.contributions(place, calibrated).sum(dtype=np.float64)
        assert total == pytest.approx(explanation.score(place, calibrated), rel=1e-5)


@pytest.mark.parametrize("calibrated", [True, False])
def test_difference_of_two_classes(explanation: Explanation, calibrated: bool) -> None:
    difference = explanation.contributions(0, calibrated, versus=1)
    separate = [explanation.contributions(place, calibrated) for place in range(2)]
    np.testing.assert_allclose(difference, separate[0] - separate[1])
    expected = explanation.score(0, calibrated) - explanation.score(1, calibrated)
    assert explanation.score(0, calibrated, versus=1) == pytest.approx(expected)
    assert difference.sum(dtype=np.float64) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(explanation.contributions(1, calibrated, versus=0), -difference)


def test_own_scale(explanation: Explanation) -> None:
    plain = explanation.contributions(1, calibrated=False)
    assert explanation.scale(1, False, None, signed=False, common=False) == positive_scale(plain)
    assert explanation.scale(1, False, None, signed=True, common=False) == signed_scale(plain)
    difference = explanation.contributions(1, True, versus=0)
    assert explanation.scale(1, True, 0, signed=True, common=False) == signed_scale(difference)


@pytest.mark.parametrize("signed", [True, False])
def test_common_scale_covers_every_map(explanation: Explanation, signed: bool) -> None:
    scales = {explanation.scale(place, True, None, signed=signed, common=True) for place in range(2)}
    (scale,) = scales
    maps = np.stack([explanation.contributions(place, True) for place in range(2)])
    assert scale.high == pytest.approx(np.abs(maps).max() if signed else maps.max())
    assert (scale.low < 0) is signed


@pytest.mark.parametrize("signed", [True, False])
def test_common_scale_covers_every_difference(explanation: Explanation, signed: bool) -> None:
    scales = {explanation.scale(a, True, b, signed=signed, common=True) for a, b in ((0, 1), (1, 0))}
    (scale,) = scales
    assert scale.high == pytest.approx(np.abs(explanation.contributions(0, True, versus=1)).max())
    assert scale.low == (-scale.high if signed else 0.0)


def test_caption(explanation: Explanation) -> None:
    assert explanation.caption(1, calibrated=True).title == "Löwe"
    assert explanation.caption(1, True).detail == f"calibrated score {explanation.calibrated_logits[1]:.2f}"
    versus = explanation.caption(1, False, versus=0)
    assert (versus.title, versus.rival) == ("Löwe", "red\nfox")
    assert versus.detail == f"plain difference {explanation.logits[1] - explanation.logits[0]:.2f}"


def test_marc_map_by_hand() -> None:
    plain = np.array([[1.0, 2.0], [3.0, -1.0]], dtype=np.float32)
    np.testing.assert_allclose(marc_map(plain, omega=2.0, offset=4.0), [[3, 5], [7, -1]])


def test_offsets(bundle: Bundle) -> None:
    calibration = bundle.manifest.calibration
    assert offsets(calibration, [4, 1]) == [calibration.beta[k] * calibration.weight_norms[k] for k in (4, 1)]
