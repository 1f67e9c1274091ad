from __future__ import annotations

import numpy as np
import pytest

from camcal.models.bundle import Bundle
from camcal.service.engine.ranking import Ranker
from camcal.service.engine.session import Outputs, Session


@pytest.fixture(scope="module")
def outputs(session: Session) -> Outputs:
    manifest = session.bundle.manifest
    size = manifest.preprocessing.input_size
    images = np.random.default_rng(1).integers(0, 256, size=(8, size, size, 3), dtype=np.uint8)
    return session.run(images, top_k=len(manifest.classes))


def test_balanced_prior_equals_the_outputs_of_the_graph(bundle: Bundle, outputs: Outputs) -> None:
    ranking = Ranker(bundle.manifest).rank(outputs, row=2, top_k=3, prior="balanced")
    assert ranking.classes == outputs.top_classes[2, :3].tolist()
    np.testing.assert_array_equal(ranking.calibrated_probabilities, outputs.calibrated_probabilities[2])


def test_train_prior_follows_bayes(bundle: Bundle, outputs: Outputs) -> None:
    ranking = Ranker(bundle.manifest).rank(outputs, row=2, top_k=3, prior="train")
    counts = bundle.manifest.train_counts()
    temperature = bundle.manifest.calibration.prior_temperatures["train"]
    expected = np.exp(outputs.calibrated_logits[2].astype(np.float64) / temperature) * counts
    np.testing.assert_allclose(ranking.calibrated_probabilities, expected / expected.sum(), rtol=1e-4)
    assert ranking.classes == np.argsort(-expected)[:3].tolist()


def test_given_prior_is_that_of_the_manifest(bundle: Bundle, outputs: Outputs) -> None:
    prior = [0.28] + [0.08] * 9
    ranker = Ranker(bundle.manifest.model_copy(update={"prior": prior}))
    assert ranker.priors == ("balanced", "train", "given")
    ranking = ranker.rank(outputs, row=2, top_k=3, prior=ranker.check_prior("given"))
    expected = outputs.calibrated_probabilities[2].astype(np.float64) * prior
    np.testing.assert_allclose(ranking.calibrated_probabilities, expected / expected.sum(), rtol=1e-4)
    with pytest.raises(ValueError, match="prior is 'given'; the model has balanced and train"):
        Ranker(bundle.manifest).check_prior("given")


def test_each_prior_has_its_own_temperature(bundle: Bundle, outputs: Outputs) -> None:
    calibration = bundle.manifest.calibration.model_copy(update={"prior_temperatures": {"train": 3.0}})
    ranker = Ranker(bundle.manifest.model_copy(update={"calibration": calibration}))
    counts = bundle.manifest.train_counts()
    expected = np.exp(outputs.calibrated_logits[2].astype(np.float64) / 3) * counts
    ranking = ranker.rank(outputs, row=2, top_k=3, prior="train")
    np.testing.assert_allclose(ranking.calibrated_probabilities, expected / expected.sum(), rtol=1e-4)


def test_train_prior_raises_the_largest_class(bundle: Bundle, outputs: Outputs) -> None:
    calibration = bundle.manifest.calibration.model_copy(update={"prior_temperatures": {}})
    ranker, counts = (
        Ranker(bundle.manifest.model_copy(update={"calibration": calibration})),
        bundle.manifest.train_counts(),
    )
    head = int(counts.argmax())
    for row in range(8):
        balanced, train = (ranker.rank(outputs, row, 1, prior).calibrated_probabilities for prior in ranker.priors)
        assert train[head] > balanced[head]


def test_rows_are_sorted_and_complete(bundle: Bundle, outputs: Outputs) -> None:
    ranker = Ranker(bundle.manifest)
    for prior in ranker.priors:
        rows = ranker.rows(ranker.rank(outputs, row=0, top_k=4, prior=prior))
        probabilities = [row["calibrated_probability"] for row in rows]
        assert probabilities == sorted(probabilities, reverse=True)
        info = bundle.manifest.classes[rows[0]["class_id"]]
        assert (rows[0]["label"], rows[0]["group"], rows[0]["train_count"]) == (info.name, info.group, info.train_count)


def test_maps_needed(bundle: Bundle) -> None:
    ranker = Ranker(bundle.manifest)
    assert ranker.maps_needed(3, "balanced", cam=True) == 3
    assert ranker.maps_needed(3, "train", cam=True) == ranker.classes
    assert ranker.maps_needed(3, "train", cam=False) == 1
    assert ranker.maps_needed(3, "balanced", cam=True, others=True) == ranker.classes
    assert ranker.maps_needed(3, "balanced", cam=False, others=True) == 3


def test_maps_match_their_classes(bundle: Bundle, outputs: Outputs) -> None:
    classes = [7, 0, 3]
    maps = Ranker(bundle.manifest).maps(outputs, row=5, classes=classes)
    np.testing.assert_allclose(maps.sum(axis=(1, 2)), outputs.logits[5, classes], rtol=1e-4, atol=1e-4)


def test_top_k_limits(bundle: Bundle) -> None:
    ranker = Ranker(bundle.manifest)
    assert ranker.check_top_k(None) == 5
    assert ranker.check_top_k(10) == 10
    with pytest.raises(ValueError, match="top_k is 11; the model has 10 classes: expected 1 to 10"):
        ranker.check_top_k(11)


def test_class_by_index_or_label(bundle: Bundle) -> None:
    ranker = Ranker(bundle.manifest)
    assert [ranker.class_id(name) for name in ("0", "9", "03")] == [0, 9, 3]
    for k, info in enumerate(bundle.manifest.classes):
        assert ranker.class_id(info.name) == k
    for name in ("10", "-1", "", "nope", "٣", "9" * 500):
        if name not in {info.name for info in bundle.manifest.classes}:
            with pytest.raises(ValueError, match="expected an index from 0 to 9, or a label as in GET /model"):
                ranker.class_id(name)
