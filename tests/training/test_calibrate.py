import numpy as np
import torch
from scipy.optimize import minimize, minimize_scalar

from models.classifier import LongTailClassifier
from training.calibrate import MIN_OMEGA, class_weights, fit_marc, fit_scale, predict_logits
from training.config import CalibrateConfig, Recipe
from training.data import LabelledImages, load_dataset
from training.run import Run, load_network


def _problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (400,), generator=generator)
    logits = torch.randn(400, 5, generator=generator) + 1.5 * torch.nn.functional.one_hot(labels, 5)
    return 3 * logits, labels


def test_scale_is_the_optimum_that_scipy_finds() -> None:
    logits, labels = _problem()
    weights = torch.rand(400, generator=torch.Generator().manual_seed(1))
    z, y, w = logits.double().numpy(), labels.numpy(), weights.double().numpy()

    def loss(a: float) -> float:
        scaled = a * z
        normaliser = np.log(np.exp(scaled - scaled.max(1, keepdims=True)).sum(1)) + scaled.max(1)
        return float(w @ (normaliser - scaled[np.arange(400), y]) / w.sum())

    expected = minimize_scalar(loss, bounds=(0.02, 50), method="bounded", options={"xatol": 1e-7}).x
    assert abs(fit_scale(logits, labels, weights) / expected - 1) < 1e-4


def test_class_weights_by_hand() -> None:
    weights = class_weights(np.array([8, 1]), exponent=1 / 3)
    torch.testing.assert_close(weights, torch.tensor([2 / 3, 4 / 3]))
    assert class_weights(np.array([500, 50, 5]), 1.2).sum() == 3


def test_marc_comes_close_to_the_optimum_of_its_loss() -> None:
    logits, labels = _problem()
    norms, counts = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0]), np.array([200, 100, 60, 30, 10])
    config = CalibrateConfig(iterations=3000, batch_size=400, lr=0.05)
    marc = fit_marc(logits, labels, norms, counts, config, seed=0)
    w = class_weights(counts, 1.2).double().numpy()[labels.numpy()]
    z, y, n = logits.double().numpy(), labels.numpy(), norms.double().numpy()

    def loss(parameters: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
        scaled = parameters[:5] * z + parameters[5:] * n
        shifted = scaled - scaled.max(1, keepdims=True)
        return float(w @ (np.log(np.exp(shifted).sum(1)) - shifted[np.arange(400), y]) / w.sum())

    start = np.concatenate([np.ones(5), np.zeros(5)])
    bounds = [(MIN_OMEGA, None)] * 5 + [(None, None)] * 5
    best = minimize(loss, start, bounds=bounds).fun
    found = loss(np.concatenate([marc.omega.detach().numpy(), marc.beta.detach().numpy()]).astype(np.float64))
    assert loss(start) - best > 0.05
    assert found - best < 0.05 * (loss(start) - best)


def test_omega_stays_positive_where_the_loss_would_turn_it_over() -> None:
    labels = torch.tensor([0, 1] * 100)
    logits = torch.nn.functional.one_hot(1 - labels, 2).float() * 10
    config = CalibrateConfig(iterations=300, lr=0.5)
    assert fit_marc(logits, labels, torch.ones(2), np.array([100, 100]), config, seed=0).omega.min() >= MIN_OMEGA


def test_calibration_of_a_real_run_moves_the_tail_up(digits_run: Run, digits_recipe: Recipe) -> None:
    network, _, meta = load_network(digits_run.network)
    data = load_dataset(digits_recipe.data, digits_recipe.seed)
    with torch.no_grad():
        logits = predict_logits(network, data.test)
        raw, calibrated = logits.argmax(dim=1), network.calibrate(logits).argmax(dim=1)
    tail = data.test.labels >= 7
    assert (calibrated == data.test.labels)[tail].sum() > (raw == data.test.labels)[tail].sum()
    assert meta["calibration"]["scalar"] == network.head.scalar.item()


def test_logits_do_not_depend_on_the_batch(digits_run: Run, digits_recipe: Recipe) -> None:
    network: LongTailClassifier = load_network(digits_run.network)[0]
    test = load_dataset(digits_recipe.data, digits_recipe.seed).test
    part = LabelledImages(images=test.images[:20], labels=test.labels[:20])
    torch.testing.assert_close(
        predict_logits(network, part), predict_logits(network, part, batch_size=3), rtol=1e-4, atol=1e-4
    )
