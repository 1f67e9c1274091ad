import numpy as np
import pytest

from camcal.training import metrics

P = np.array([[0.7, 0.2, 0.1], [0.4, 0.5, 0.1], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]])
Y = np.array([0, 0, 2, 1])
ONES = np.ones(4)


def test_softmax_by_hand_and_without_overflow() -> None:
    np.testing.assert_allclose(metrics.softmax(np.log([[1.0, 3.0]])), [[0.25, 0.75]])
    np.testing.assert_allclose(metrics.softmax(np.array([[1e4, 0.0]], dtype=np.float32)), [[1, 0]])


def test_accuracy_per_class_and_group() -> None:
    per_class = metrics.per_class_accuracy(P, Y)
    assert per_class.tolist() == [0.5, 0.0, 1.0]
    assert metrics.group_accuracy(per_class, ["many", "many", "few"]) == {"many": 0.25, "medium": None, "few": 1.0}


def test_a_class_without_samples_has_no_accuracy() -> None:
    per_class = metrics.per_class_accuracy(P[:2], Y[:2])
    assert np.isnan(per_class[1:]).all()
    assert metrics.group_accuracy(per_class, ["many", "few", "few"])["few"] is None


def test_ece_by_hand() -> None:
    # Confidences .7 (right), .5 (wrong), .8 (right), .4 (wrong), each alone in its bin of 1/15.
    assert metrics.expected_calibration_error(P, Y, ONES) == pytest.approx((0.3 + 0.5 + 0.2 + 0.4) / 4)


def test_ece_joins_what_falls_into_one_bin() -> None:
    p = np.array([[0.61, 0.39], [0.65, 0.35]])
    assert metrics.expected_calibration_error(p, np.array([0, 1]), np.ones(2)) == pytest.approx(abs(0.63 - 0.5))


def test_bins_are_closed_above() -> None:
    diagram = metrics.reliability(np.array([0.0, 1 / 15, 1.0]), np.array([0.0, 0.0, 1.0]), np.ones(3))
    assert [round(b.share, 3) for b in diagram] == [0.667] + [0] * 13 + [0.333]


def test_classwise_error_by_hand() -> None:
    p = np.array([[0.9, 0.1], [0.8, 0.2]])
    # Class 0: |.9 - 1|/2 + |.8 - 0|/2 = .45; class 1: |.1 - 0|/2 + |.2 - 1|/2 = .45.
    assert metrics.classwise_calibration_error(p, np.array([0, 1]), np.ones(2)) == pytest.approx(0.45)


def test_nll_and_brier_by_hand() -> None:
    p, y = np.array([[0.5, 0.5], [0.25, 0.75]]), np.array([0, 1])
    assert metrics.negative_log_likelihood(p, y, np.ones(2)) == pytest.approx(-(np.log(0.5) + np.log(0.75)) / 2)
    assert metrics.brier_score(p, y, np.ones(2)) == pytest.approx((0.5 + 0.125) / 2)


def test_a_weight_of_two_counts_like_a_sample_twice() -> None:
    weighted = metrics.figures(P, Y, ["many", "medium", "few"], np.array([1.0, 2.0, 1.0, 1.0]))
    index = [0, 1, 1, 2, 3]
    repeated = metrics.figures(P[index], Y[index], ["many", "medium", "few"], np.ones(5))
    for name in ("accuracy", "ece", "classwise_ece", "nll", "brier"):
        assert getattr(weighted, name) == pytest.approx(getattr(repeated, name))


def test_perfect_probabilities_have_no_error() -> None:
    rng = np.random.default_rng(0)
    p = metrics.softmax(rng.normal(size=(200_000, 4)))
    y = (p.cumsum(axis=1) > rng.random((len(p), 1))).argmax(axis=1)
    result = metrics.figures(p, y, ["many"] * 4, np.ones(len(y)))
    assert result.ece < 0.005 and result.classwise_ece < 0.005


def test_calibration_by_predicted_group_by_hand() -> None:
    # Predicted: 0 (.7, right), 1 (.5, wrong), 2 (.8, right), 2 (.4, wrong).
    found = metrics.calibration_by_group(P, Y, ["many", "many", "few"], np.array([1.0, 3.0, 1.0, 1.0]))
    many, medium, few = (found[group] for group in ("many", "medium", "few"))
    assert medium is None and many is not None and few is not None
    assert many.model_dump(include={"share", "confidence", "accuracy", "ece"}) == pytest.approx(
        {"share": 4 / 6, "confidence": (0.7 + 3 * 0.5) / 4, "accuracy": 1 / 4, "ece": (0.3 + 3 * 0.5) / 4}
    )
    assert few.model_dump(include={"share", "confidence", "accuracy", "ece"}) == pytest.approx(
        {"share": 2 / 6, "confidence": 0.6, "accuracy": 0.5, "ece": (0.2 + 0.4) / 2}
    )


def test_perfect_probabilities_are_as_sure_as_right_in_every_predicted_group() -> None:
    rng = np.random.default_rng(0)
    p = metrics.softmax(rng.normal(size=(200_000, 3)) + np.array([1.0, 0.0, -0.5]))
    y = (p.cumsum(axis=1) > rng.random((len(p), 1))).argmax(axis=1)
    for group in metrics.calibration_by_group(p, y, ["many", "medium", "few"], np.ones(len(y))).values():
        assert group is not None
        assert group.confidence == pytest.approx(group.accuracy, abs=0.01)


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="0 probabilities for 0 labels"):
        metrics.figures(P[:0], Y[:0], ["many"] * 3, np.ones(0))


@pytest.mark.parametrize(("classes", "sizes"), [(10, [3, 4, 3]), (100, [36, 35, 29]), (3, [1, 1, 1]), (2, [1, 0, 1])])
def test_rank_groups_have_the_usual_sizes(classes: int, sizes: list[int]) -> None:
    groups = metrics.rank_groups(np.arange(classes, 0, -1))
    assert groups == ["head"] * sizes[0] + ["middle"] * sizes[1] + ["tail"] * sizes[2]


def test_rank_groups_follow_the_counts_and_not_the_order_of_classes() -> None:
    assert metrics.rank_groups(np.array([5, 900, 30])) == ["tail", "head", "middle"]


def test_spread_per_class_by_hand() -> None:
    mean, spread = metrics.per_class_spread(np.array([1.0, 3.0, 7.0]), np.array([0, 0, 2]), 3)
    np.testing.assert_array_equal(mean, [2, np.nan, 7])
    np.testing.assert_array_equal(spread, [1, np.nan, 0])


def test_what_a_class_is_taken_for() -> None:
    predicted, labels = np.array([0, 1, 1, 2, 2, 2, 0]), np.array([0, 0, 0, 0, 0, 2, 2])
    assert metrics.taken_for(predicted, labels, 0, most=1) == [(1, 0.4)]
    assert metrics.taken_for(predicted, labels, 0) == [(1, 0.4), (2, 0.4)]
    assert metrics.taken_for(labels, labels, 2) == []


def test_the_error_by_chance_is_that_of_redrawn_answers_and_fades_with_more() -> None:
    rng = np.random.default_rng(0)
    found = []
    for n in (50, 500, 5000):
        p = metrics.softmax(rng.normal(size=(n, 4)))
        y = [(p.cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1) for _ in range(50)]
        drawn = np.mean([metrics.expected_calibration_error(p, y_N, np.ones(n)) for y_N in y])
        found.append(metrics.calibration_errors(p, y[0], np.ones(n)).ece_by_chance)
        assert found[-1] == pytest.approx(drawn, rel=0.1)
    assert found[0] > 2 * found[1] > 4 * found[2] > 0


def _answers(n: int, rng: np.random.Generator, off: float) -> tuple[metrics.Floats, metrics.Labels, metrics.Floats]:
    """Probabilities of two classes, labels that agree with them but for `off`, and weights from 1 to 20."""
    p = rng.beta(2.2, 1.2, n) / 2 + 0.5
    right = rng.random(n) < p - off * np.sin(2 * np.pi * (p - 0.5))
    return np.stack([p, 1 - p], axis=1), np.where(right, 0, 1), np.exp(rng.uniform(0, np.log(20), n))


@pytest.mark.parametrize("off", [0.0, 0.05, 0.12])
def test_the_debiased_error_is_nearer_to_that_of_endless_images_and_the_interval_holds_it(off: float) -> None:
    rng = np.random.default_rng(0)
    many = _answers(400_000, rng, off)
    true = metrics.expected_calibration_error(*many)
    found = [metrics.calibration_errors(*_answers(600, rng, off)) for _ in range(100)]
    plain, debiased = (np.mean([getattr(each, name) for each in found]) for name in ("ece", "ece_debiased"))
    # Where the error is large, its bias is small, and either is near.
    assert abs(debiased - true) < 0.8 * abs(plain - true) or abs(debiased - true) < 0.005
    held = np.mean([each.ece_interval[0] <= true <= each.ece_interval[1] for each in found])
    assert held >= 0.8 if off else all(each.ece_interval[0] < 0.04 for each in found)
    for each in found:
        assert 0 <= each.ece_interval[0] <= each.ece_interval[1] and 0 <= each.ece_debiased <= each.ece


def test_the_bias_is_that_of_normal_resampling() -> None:
    """Bin by bin as the library of Kumar et al. resamples it, with all weights equal."""
    rng = np.random.default_rng(0)
    p_NK, y, _ = _answers(300, rng, 0.1)
    p, right = p_NK.max(axis=1), (p_NK.argmax(axis=1) == y).astype(float)
    index = np.ceil(p * 15).astype(int) - 1
    drawn = np.zeros(20_000)
    for b in np.unique(index):
        here = index == b
        a, share = right[here].mean(), here.mean()
        samples = rng.normal(a, np.sqrt(a * (1 - a) / here.sum()), len(drawn))
        drawn += share * np.abs(samples - p[here].mean())
    found = metrics.calibration_errors(p_NK, y, np.ones(300))
    assert found.ece_debiased == pytest.approx(2 * found.ece - drawn.mean(), abs=5e-4)


def test_one_answer_has_errors_too() -> None:
    found = metrics.calibration_errors(np.array([[0.7, 0.3]]), np.array([1]), np.ones(1))
    assert found.ece == found.ece_debiased == pytest.approx(0.7) and found.ece_interval == pytest.approx((0.7, 0.7))
    assert found.ece_by_chance == pytest.approx(2 * 0.7 * 0.3, abs=0.03)
