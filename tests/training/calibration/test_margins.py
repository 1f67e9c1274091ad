from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from camcal.training.calibration import margins
from camcal.training.calibration.margins import MIN_OMEGA, Margins, fit_lws, fit_marc, fit_shrunk
from camcal.training.fitting.losses import grw_weights
from camcal.training.recipe import CalibrateConfig

Floats = np.ndarray[Any, np.dtype[np.float64]]
COUNTS = np.array([200, 100, 60, 30, 10])
NORMS = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])


def _problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (400,), generator=generator)
    logits = torch.randn(400, 5, generator=generator) + 1.5 * torch.nn.functional.one_hot(labels, 5)
    return 3 * logits, labels


def _loss(omega: Floats, offset: Floats, weights: Floats, kept: torch.Tensor | None = None) -> float:
    """The weighted cross-entropy of ω·z + δ on the problem, or on the samples of it that are kept, in float64."""
    logits, labels = _problem()
    if kept is not None:
        logits, labels = logits[kept], labels[kept]
    scaled = omega * logits.double().numpy() + offset
    shifted = scaled - scaled.max(1, keepdims=True)
    w = weights[labels.numpy()]
    return float(w @ (np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels.numpy()]) / w.sum())


def test_marc_comes_close_to_the_optimum_of_its_loss() -> None:
    logits, labels = _problem()
    config = CalibrateConfig(iterations=3000, batch_size=400, lr=0.05)
    marc = fit_marc(logits, labels, NORMS, COUNTS, config, seed=0)
    w, n = grw_weights(COUNTS, 1.2).double().numpy(), NORMS.double().numpy()

    def loss(parameters: Floats) -> float:
        return _loss(parameters[:5], parameters[5:] * n, w)

    start = np.concatenate([np.ones(5), np.zeros(5)])
    bounds = [(MIN_OMEGA, None)] * 5 + [(None, None)] * 5
    best = minimize(loss, start, bounds=bounds).fun
    found = loss(np.concatenate([marc.omega.detach().numpy(), marc.beta.detach().numpy()]).astype(np.float64))
    assert loss(start) - best > 0.05
    assert found - best < 0.05 * (loss(start) - best)


def test_the_highest_rate_is_one_over_the_steepest_curvature() -> None:
    """By second differences of the loss along each ω_k and β_k, where p is each class's share of the weights."""
    logits, labels = _problem()
    w, norms = grw_weights(COUNTS, 1.2), NORMS.double().numpy()
    weights_N = w[labels].double().numpy()
    shares = np.bincount(labels, weights=weights_N, minlength=5) / weights_N.sum()
    z, y = logits.double().numpy(), labels.numpy()

    def loss(k: int, x_N: Floats, step: float) -> float:
        scores = np.tile(np.log(shares), (len(y), 1))
        scores[:, k] += step * x_N
        log_p = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        return float(-weights_N @ log_p[np.arange(len(y)), y] / weights_N.sum())

    e = 1e-3
    curvatures = [
        (loss(k, x_N, e) - 2 * loss(k, x_N, 0) + loss(k, x_N, -e)) / e**2
        for k in range(5)
        for x_N in (z[:, k], np.full(len(y), norms[k]))
    ]
    assert margins._highest_rate(logits, labels, NORMS, w) == pytest.approx(1 / max(curvatures), rel=1e-3)


@pytest.mark.parametrize("scalar", [1.0, 10.0, 30.0])
@pytest.mark.parametrize("classes", [2, 10])
def test_marc_converges_with_few_classes_and_a_large_scalar(classes: int, scalar: float) -> None:
    generator = torch.Generator().manual_seed(0)
    prior = 100.0 ** (-torch.arange(classes) / (classes - 1))
    counts = (2000 * prior).long()
    labels = torch.arange(classes).repeat_interleave(counts)
    seen = torch.randn(len(labels), classes, generator=generator) + 1.5 * torch.nn.functional.one_hot(labels, classes)
    logits, norms, weights = 1.5 * seen + prior.log(), torch.full((classes,), scalar), grw_weights(counts.numpy(), 1.2)
    published = CalibrateConfig(lr=0.1, warmup=800, weight_decay=5e-4)

    def loss(penalty: float) -> float:
        marc = fit_marc(logits, labels, norms, counts.numpy(), published, seed=0, penalty=penalty)
        return torch.nn.functional.cross_entropy(marc(logits, norms), labels, weight=weights).item()

    start = torch.nn.functional.cross_entropy(logits, labels, weight=weights).item()
    best = loss(1e-6)
    assert start - best > 1 and loss(0.0) - best < 0.03 * (start - best)


def test_sgd_takes_the_published_steps() -> None:
    """Momentum, decay, warm-up and cosine against the same written out in NumPy, on the very batches that are drawn."""
    logits, labels = _problem()
    config = CalibrateConfig(iterations=30, warmup=10, batch_size=16, lr=0.02, momentum=0.8, weight_decay=0.1)
    marc = fit_marc(logits, labels, NORMS, COUNTS, config, seed=7)
    z, y, norms = logits.double().numpy(), labels.numpy(), NORMS.double().numpy()
    weights = COUNTS**-1.2 / (COUNTS**-1.2).sum() * 5
    generator = torch.Generator().manual_seed(7)
    both, velocity = np.stack([np.ones(5), np.zeros(5)]), np.zeros((2, 5))
    for t in range(30):
        index = torch.randint(400, (16,), generator=generator).numpy()
        scores = both[0] * z[index] + both[1] * norms
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        w = weights[y[index]]
        pull = w[:, None] / w.sum() * (p - np.eye(5)[y[index]])
        slope = np.stack([(pull * z[index]).sum(0), pull.sum(0) * norms]) + 0.1 * both
        velocity = 0.8 * velocity + slope
        rate = 0.02 * (0.5 + 0.5 * t / 10 if t < 10 else 0.5 + 0.5 * np.cos(np.pi * (t - 10) / 20))
        both = both - rate * velocity
        both[0] = np.maximum(both[0], MIN_OMEGA)
    np.testing.assert_allclose(marc.omega.detach().numpy(), both[0], rtol=1e-4)
    np.testing.assert_allclose(marc.beta.detach().numpy(), both[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("penalty", [0.01, 3.0])
@pytest.mark.parametrize("sign", [1, -1], ids=["helpful", "misleading"])  # ω of misleading logits meets its bound
def test_the_penalised_fit_is_the_minimum_that_scipy_finds(penalty: float, sign: int) -> None:
    logits, labels = _problem()
    logits = sign * logits
    start = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    marc = fit_marc(logits, labels, NORMS, COUNTS, CalibrateConfig(), seed=0, start_K=start, penalty=penalty)
    w = grw_weights(COUNTS, 1.2).double().numpy()

    def loss(parameters: Floats) -> float:
        away = (parameters[:5] - 1) ** 2 + (parameters[5:] - start.double().numpy()) ** 2
        return _loss(sign * parameters[:5], parameters[5:], w) + penalty / (2 * 5) * float((away / COUNTS).sum())

    bounds = [(MIN_OMEGA, None)] * 5 + [(None, None)] * 5
    options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 10_000, "maxfun": 10**6}
    best = minimize(
        loss, np.concatenate([np.ones(5), start.numpy()]), method="L-BFGS-B", bounds=bounds, options=options
    ).x
    assert sign == 1 or marc.omega.min().item() == pytest.approx(MIN_OMEGA, rel=0.01)
    np.testing.assert_allclose(marc.omega.detach().numpy(), best[:5], atol=1e-3)
    offset, wanted = (marc.beta * NORMS).detach().numpy(), best[5:]
    # The same added to all offsets changes the penalty alone, which hardly tells where the minimum is.
    np.testing.assert_allclose(offset - offset.mean(), wanted - wanted.mean(), atol=1e-3)
    np.testing.assert_allclose(offset, wanted, atol=1e-1 if penalty < 1 else 1e-3)


@pytest.mark.parametrize("exponent", [1.0, 1.2])
def test_margins_of_exact_logits_end_at_the_prior_that_the_weights_leave(exponent: float) -> None:
    generator = np.random.default_rng(0)
    counts = 5000 * 0.01 ** (np.arange(10) / 9)
    prior = counts / counts.sum()
    labels = generator.choice(10, 40_000, p=prior)
    # x ~ N(2·e_y, 1): softmax(2·x + log π) is the posterior, and what weights leave of π is π^(1-exponent).
    logits = 2 * (generator.normal(size=(40_000, 10)) + 2 * np.eye(10)[labels]) + np.log(prior)
    config = CalibrateConfig(exponent=exponent)
    n = np.bincount(labels, minlength=10)
    z, y, norms = torch.from_numpy(logits).float(), torch.from_numpy(labels), torch.ones(10)
    marc = fit_marc(z, y, norms, n, config, seed=0, penalty=1e-6)
    left = marc(torch.from_numpy(np.log(prior)).float()[None], norms).detach().numpy()[0]
    slope = np.polyfit(np.log(prior), left, 1)[0]
    assert slope == pytest.approx(1 - exponent, abs=0.05)


def test_where_the_search_begins_changes_nothing() -> None:
    logits, labels = _problem()
    found = fit_marc(-logits, labels, NORMS, COUNTS, CalibrateConfig(), seed=0, penalty=0.1)  # ω at its bound
    near = Margins(found.omega.detach(), found.beta.detach() * NORMS)
    for penalty in (0.1, 1.0):
        fits = [
            fit_marc(logits, labels, NORMS, COUNTS, CalibrateConfig(), seed=0, penalty=penalty, near=begin)
            for begin in (None, near)
        ]
        torch.testing.assert_close(fits[0].omega, fits[1].omega, rtol=0, atol=1e-3)
        torch.testing.assert_close(fits[0].beta, fits[1].beta, rtol=0, atol=1e-2)


def test_the_penalised_fit_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = _problem()
    whole = fit_marc(logits, labels, NORMS, COUNTS, CalibrateConfig(), seed=0, penalty=1.0)
    monkeypatch.setattr(margins, "CHUNK", 7 * 5)
    parts = fit_marc(logits, labels, NORMS, COUNTS, CalibrateConfig(), seed=0, penalty=1.0)
    torch.testing.assert_close(parts.omega, whole.omega, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.beta, whole.beta, rtol=1e-4, atol=1e-4)


def test_a_strong_penalty_leaves_margins_where_they_start() -> None:
    logits, labels = _problem()
    start = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    marc = fit_marc(logits, labels, NORMS, COUNTS, CalibrateConfig(), seed=0, start_K=start, penalty=1e7)
    torch.testing.assert_close(marc.omega.detach(), torch.ones(5), rtol=0, atol=1e-3)
    torch.testing.assert_close(marc.beta.detach() * NORMS, start, rtol=0, atol=1e-3)


def test_a_class_without_images_stays_near_its_start() -> None:
    logits, labels = _problem()
    seen, counts = labels < 4, np.array([100, 100, 100, 100, 0])
    marc = fit_marc(logits[seen], labels[seen], NORMS, counts, CalibrateConfig(), seed=0, penalty=50.0)
    assert torch.isfinite(marc.omega).all() and abs(marc.omega[4].item() - 1) < 0.3


def test_omega_stays_positive_where_the_loss_would_turn_it_over() -> None:
    labels = torch.tensor([0, 1] * 100)
    logits = torch.nn.functional.one_hot(1 - labels, 2).float() * 10
    config, counts = CalibrateConfig(iterations=300, lr=0.5), np.array([100, 100])
    for penalty in (0.0, 0.1):
        marc = fit_marc(logits, labels, torch.ones(2), counts, config, seed=0, penalty=penalty)
        assert marc.omega.min() >= MIN_OMEGA


def test_a_warm_up_and_weight_decay_change_the_way_but_not_where_it_leads() -> None:
    logits, labels = _problem()
    plain = CalibrateConfig(iterations=2000, batch_size=400)
    published = CalibrateConfig(iterations=2000, batch_size=400, warmup=800, lr=0.1, weight_decay=5e-4)
    w, n = grw_weights(COUNTS, 1.2).double().numpy(), NORMS.double().numpy()
    losses = []
    for config in (plain, published):
        marc = fit_marc(logits, labels, NORMS, COUNTS, config, seed=0)
        losses.append(_loss(marc.omega.detach().double().numpy(), marc.beta.detach().double().numpy() * n, w))
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.01


@pytest.mark.parametrize("penalty", [0.5, 20.0])
def test_shrunk_margins_are_the_minimum_that_scipy_finds(penalty: float) -> None:
    logits, labels = _problem()
    kept = torch.cat([(labels == k).nonzero().flatten()[: 40 >> k] for k in (0, 1, 2, 4)])  # class 3 has no image
    z, y = 0.4 * logits[kept], labels[kept]
    found = fit_shrunk(z, y, penalty)
    assert (found.omega_K[3].item(), found.offset_K[3].item()) == (1, 0)
    present, counts = [0, 1, 2, 4], np.array([40, 20, 10, 2])
    z_N, y_N = z[:, present].double().numpy(), np.searchsorted(present, y.numpy())

    def loss(parameters: Floats) -> float:
        scores = parameters[:4] * z_N + parameters[4:]
        losses = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(y_N)), y_N]
        away = (parameters[:4] - 1) ** 2 + parameters[4:] ** 2
        return float(np.mean([losses[y_N == k].mean() for k in range(4)]) + penalty / 8 * (away / counts).sum())

    bounds = [(MIN_OMEGA, None)] * 4 + [(None, None)] * 4
    best = minimize(loss, np.repeat([1.0, 0.0], 4), method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-15}).x
    np.testing.assert_allclose(found.omega_K[present], best[:4], atol=1e-3)
    np.testing.assert_allclose(found.offset_K[present], best[4:], atol=1e-3)
    assert np.abs(best[:4] - 1).max() > 0.02


def test_one_class_has_nothing_to_shrink() -> None:
    found = fit_shrunk(torch.randn(3, 5), torch.full((3,), 2), 1.0)
    assert found.omega_K.tolist() == [1] * 5 and found.offset_K.tolist() == [0] * 5


def test_learned_weight_scaling_comes_close_to_the_balanced_optimum() -> None:
    logits, labels = _problem()
    kept = torch.cat([(labels == k).nonzero().flatten()[: 80 >> k] for k in range(5)])  # a long tail, 80 to 5
    logits, labels = logits[kept], labels[kept]
    counts = np.bincount(labels.numpy())
    logits = logits * torch.tensor([0.2, 0.5, 1.0, 2.0, 4.0])
    found = fit_lws(logits, labels, counts, CalibrateConfig(iterations=3000, batch_size=400), seed=0)
    scales = np.array([0.2, 0.5, 1.0, 2.0, 4.0])

    def loss(scale: Floats) -> float:
        return _loss(scale * scales, np.zeros(5), 1 / counts, kept)

    best = minimize(loss, np.ones(5), bounds=[(MIN_OMEGA, None)] * 5).fun
    assert loss(np.ones(5)) - best > 0.05
    assert loss(found.double().numpy()) - best < 0.05 * (loss(np.ones(5)) - best)
