import numpy as np
import torch
from scipy.optimize import minimize_scalar

from models.classifier import LongTailClassifier
from training.calibrate import fit_scale, predict_logits
from training.config import Recipe
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
