import numpy as np
import pytest

from camcal.training.priors import given_prior, prior_weights, shift_prior


def test_shifting_the_prior_by_hand() -> None:
    shifted = shift_prior(np.array([[0.5, 0.5], [0.9, 0.1]]), np.array([0.75, 0.25]))
    np.testing.assert_allclose(shifted, [[0.75, 0.25], [0.675 / 0.7, 0.025 / 0.7]])


def test_weights_give_samples_the_wanted_frequencies() -> None:
    labels = np.array([0, 0, 0, 1, 2, 2])
    weights = prior_weights(labels, np.array([0.2, 0.5, 0.3]))
    np.testing.assert_allclose(np.bincount(labels, weights=weights) / 6, [0.2, 0.5, 0.3])


def test_a_given_prior_by_name_or_in_order() -> None:
    classes = ["cat", "dog"]
    np.testing.assert_allclose(given_prior([1, 3], classes), [0.25, 0.75])
    np.testing.assert_allclose(given_prior({"dog": 3, "cat": 1}, classes), [0.25, 0.75])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([1.0], "has 1 numbers for 2 classes"),
        ([1.0, 0.0], "must be positive for every class, got 0"),
        ({"cat": 1.0}, "has no number for class 'dog'"),
        ({"cat": 1.0, "dog": 1.0, "cow": 1.0}, "names 'cow', which is not a class"),
    ],
)
def test_a_prior_that_does_not_fit_is_refused(wanted: list[float] | dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        given_prior(wanted, ["cat", "dog"])
