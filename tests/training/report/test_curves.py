import numpy as np

from camcal.training import metrics
from camcal.training.report.curves import scalar_curve, scalars_around


def _problem() -> tuple[metrics.Labels, metrics.Floats]:
    rng = np.random.default_rng(0)
    labels, cosines = rng.integers(0, 4, 300), rng.uniform(-0.2, 0.2, (300, 4))
    cosines[np.arange(300), labels] += 0.2
    return labels, cosines


PRIOR = np.array([0.7, 0.2, 0.07, 0.03])


def test_the_curve_against_direct_figures() -> None:
    labels, cosines = _problem()
    weights = np.random.default_rng(1).uniform(0.5, 2, 300)
    scalars = scalars_around(16)
    points = scalar_curve(cosines, labels, weights, PRIOR, scalars)
    assert [p["scalar"] for p in points] == scalars
    for point in points[::5]:
        plain = np.exp(point["scalar"] * cosines)
        adjusted = plain / PRIOR
        for name, odds in (("", plain), ("adjusted_", adjusted)):
            figures = metrics.figures(odds / odds.sum(axis=1, keepdims=True), labels, ["many"] * 4, weights)
            found = [point[name + key] for key in ("accuracy", "ece", "nll")]
            np.testing.assert_allclose(found, [figures.accuracy, figures.ece, figures.nll], rtol=1e-9)


def test_the_scalar_moves_accuracy_through_the_prior_alone() -> None:
    labels, cosines = _problem()
    points = scalar_curve(cosines, labels, np.ones(300), PRIOR, scalars_around(16))
    assert len({p["accuracy"] for p in points}) == 1 and len({p["adjusted_accuracy"] for p in points}) > 5


def test_the_selected_scalar_is_on_the_curve_and_far_from_its_ends() -> None:
    for selected in (0.3, 9.7, 30.0):
        scalars = scalars_around(selected)
        assert selected in scalars and scalars == sorted(scalars) and len(set(scalars)) == len(scalars)
        assert scalars[0] < selected / 7 and scalars[-1] > 7 * selected
