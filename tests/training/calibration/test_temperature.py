import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar

from camcal.training.calibration.temperature import fit_lean, fit_scale, fit_temperature
from camcal.training.priors import Floats


def _problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (400,), generator=generator)
    logits = torch.randn(400, 5, generator=generator) + 1.5 * torch.nn.functional.one_hot(labels, 5)
    return 3 * logits, labels


@pytest.mark.parametrize("spread", [np.inf, 0.3])
def test_scale_is_the_optimum_that_scipy_finds(spread: float) -> None:
    logits, labels = _problem()
    weights = torch.rand(400, generator=torch.Generator().manual_seed(1))
    z, y, w = logits.double().numpy(), labels.numpy(), weights.double().numpy()

    def loss(a: float) -> float:
        scaled = a * z
        normaliser = np.log(np.exp(scaled - scaled.max(1, keepdims=True)).sum(1)) + scaled.max(1)
        prior = np.log(a) ** 2 / (2 * spread**2)
        return float(w @ (normaliser - scaled[np.arange(400), y]) / w.sum() + prior * (w**2).sum() / w.sum() ** 2)

    expected = minimize_scalar(loss, bounds=(0.02, 50), method="bounded", options={"xatol": 1e-7}).x
    assert abs(fit_scale(logits, labels, weights, spread) / expected - 1) < 1e-4


def test_without_samples_nothing_is_scaled() -> None:
    nothing = torch.empty(0)
    assert fit_scale(torch.empty(0, 5), nothing.long(), nothing) == 1


def test_few_samples_move_the_scale_less_than_many() -> None:
    logits, labels = _problem()
    free = fit_scale(logits, labels, torch.ones(400))
    few, many = (fit_scale(logits.repeat(n, 1), labels.repeat(n), torch.ones(400 * n) / n, 0.3) for n in (1, 100))
    few_only = fit_scale(logits[:20], labels[:20], torch.ones(20), 0.3)
    assert free < many < few < few_only < 1
    assert abs(many / free - 1) < 0.01


@pytest.mark.parametrize("drawn", ["prior", "even"])
@pytest.mark.parametrize("raw", [1.0, 0.2])
def test_temperature_for_a_prior_is_found_whatever_the_sample_is_drawn_from(drawn: str, raw: float) -> None:
    generator = np.random.default_rng(0)
    prior = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
    labels = generator.choice(5, 20_000, p=prior if drawn == "prior" else None)
    # x ~ N(2·e_y, 1): log p(x | k) = 2·x_k + a constant, so softmax(2·x + log π) is the posterior under π.
    logits = 2 * (generator.normal(size=(20_000, 5)) + 2 * np.eye(5)[labels])
    found = fit_temperature(torch.from_numpy(1.7 * logits), torch.from_numpy(labels), prior, np.inf, np.full(5, raw))
    assert found == pytest.approx(1.7, rel=0.05)


def test_lean_and_temperature_are_the_optimum_that_scipy_finds() -> None:
    logits, labels = _problem()
    prior = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
    z, y = logits.double().numpy() + 2 * np.log(prior), labels.numpy()
    weights = (0.2 / np.bincount(y))[y]

    def loss(x: Floats) -> float:
        scores = np.exp(x[0]) * z - x[1] * np.log(prior)
        losses = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(400), y]
        return float(weights @ losses + x @ x / (2 * 0.3**2) * (weights**2).sum())

    expected = minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-12}).x
    lean, temperature = fit_lean(torch.from_numpy(z), labels, prior, 0.3)
    assert expected[1] > 0.3
    assert lean == pytest.approx(expected[1], rel=1e-4) and temperature == pytest.approx(np.exp(-expected[0]), rel=1e-4)


def test_a_lean_is_found_as_far_as_it_goes_either_way() -> None:
    generator = np.random.default_rng(0)
    prior = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
    labels = generator.choice(5, 20_000, p=prior)
    balanced = 2 * (generator.normal(size=(20_000, 5)) + 2 * np.eye(5)[labels])  # as in the test of temperatures
    for leaning in (0.4, -0.2):
        logits = torch.from_numpy(1.7 * (balanced + leaning * np.log(prior)))
        lean, temperature = fit_lean(logits, torch.from_numpy(labels), prior, 10.0)
        assert lean == pytest.approx(leaning, abs=0.03) and temperature == pytest.approx(1.7, rel=0.05)


def test_without_samples_or_a_tail_nothing_leans() -> None:
    logits, labels = _problem()
    assert fit_lean(torch.empty(0, 5), torch.empty(0).long(), np.full(5, 0.2), 0.3) == (0, 1)
    lean, temperature = fit_lean(logits, labels, np.full(5, 0.2), 0.3)
    assert lean == pytest.approx(0, abs=1e-6)
    assert temperature == pytest.approx(fit_temperature(logits, labels, np.full(5, 0.2), 0.3), rel=1e-4)


def test_a_class_without_a_sample_does_not_bend_the_fits() -> None:
    """Its probability is never right among these samples, which must not count against it."""
    generator = np.random.default_rng(0)
    prior = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
    labels = generator.choice(3, 20_000)
    logits = torch.from_numpy(2 * (generator.normal(size=(20_000, 5)) + 2 * np.eye(5)[labels]))
    lean, temperature = fit_lean(1.7 * logits, torch.from_numpy(labels), prior, 10.0)
    assert lean == pytest.approx(0, abs=0.05) and temperature == pytest.approx(1.7, rel=0.05)
    alone = fit_temperature(1.7 * logits, torch.from_numpy(labels), prior, np.inf)
    assert alone == pytest.approx(1.7, rel=0.05)
