from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from camcal.models.classifier import LongTailClassifier
from camcal.models.report import FittedCalibration
from camcal.training.calibration import calibrate as calibrate_module
from camcal.training.calibration.calibrate import TAUS
from camcal.training.calibration.logits import TrainedLogits, predict_logits
from camcal.training.calibration.methods import PENALTIES, CalibrationError
from camcal.training.calibration.temperature import fit_lean
from camcal.training.checkpoints import build_network, load_network
from camcal.training.data import Dataset, LabelledImages, load_dataset
from camcal.training.fitting.learned_prior import logit_prior
from camcal.training.priors import Floats
from camcal.training.recipe import AugmentConfig, Recipe, load_recipe
from camcal.training.run import RunFolder
from tests.training.runs import calibrated

MARC = ["calibrate.method=marc", "calibrate.iterations=300"]


def test_calibration_of_a_real_run_moves_the_tail_up(digits_run: RunFolder, digits_recipe: Recipe) -> None:
    network, _, meta = load_network(digits_run.network)
    data = load_dataset(digits_recipe.data, digits_recipe.seed)
    with torch.no_grad():
        logits = predict_logits(network, data.test)
        raw, calibrated = logits.argmax(dim=1), network.calibrate(logits).argmax(dim=1)
    tail = data.test.labels >= 7
    assert (calibrated == data.test.labels)[tail].sum() > (raw == data.test.labels)[tail].sum()
    assert meta["calibration"]["scalar"] == network.scalar


@pytest.fixture(scope="module")
def digits(digits_recipe: Recipe) -> Dataset:
    return load_dataset(digits_recipe.data, digits_recipe.seed)


def _calibrated(
    digits_run: RunFolder, digits: Dataset, *overrides: str
) -> tuple[LongTailClassifier, FittedCalibration]:
    """The trained network of the session's run, calibrated anew with other settings."""
    network, _, _ = load_network(digits_run.checkpoint)
    return network, calibrated(network, digits, load_recipe("digits", [*MARC, *overrides]))


def _mean_nll(scores: Floats, labels: NDArray[np.int64], weights: Floats) -> float:
    """By NumPy alone."""
    losses = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(labels)), labels]
    return float(weights @ losses / weights.sum())


def _best_factor(z: Floats, labels: NDArray[np.int64], prior: Floats, offset: Floats) -> float:
    """The posterior mode of a for softmax(a·z + offset), classes weighted to `prior`, by NumPy and SciPy alone."""
    weights = (prior / np.bincount(labels, minlength=len(prior)).clip(min=1))[labels]
    effective = weights.sum() ** 2 / (weights**2).sum()

    def loss(t: float) -> float:
        return _mean_nll(np.exp(t) * z + offset, labels, weights) + t**2 / (2 * 0.3**2 * float(effective))

    return float(np.exp(minimize_scalar(loss, bounds=(-4, 4), method="bounded", options={"xatol": 1e-8}).x))


def test_scalar_and_temperatures_are_each_the_optimum_for_their_prior(digits_run: RunFolder, digits: Dataset) -> None:
    network, fitted = _calibrated(digits_run, digits)
    trained, _, _ = load_network(digits_run.checkpoint)
    held = digits.holdout
    labels, z = held.labels.numpy(), predict_logits(trained, held).double().numpy()
    seen = np.bincount(digits.train.labels.numpy())
    counts = digits.train_counts()
    even, nothing = np.full(10, 0.1), np.zeros(10)
    factor = _best_factor(z, labels, seen / seen.sum(), nothing)  # plain cross-entropy: the prior of what it saw
    assert fitted.scalar / fitted.trained_scalar == pytest.approx(factor, rel=1e-4)
    omega, beta = network.marc.omega.detach().double().numpy(), network.marc.beta.detach().double().numpy()
    margins = omega * factor * z + beta * network.weight_norms().detach().double().numpy()
    assert 1 / fitted.temperature == pytest.approx(_best_factor(margins, labels, even, nothing), rel=1e-3)
    prior = counts / counts.sum()
    expected = _best_factor(margins, labels, prior, np.log(prior))
    assert 1 / fitted.prior_temperatures["train"] == pytest.approx(expected, rel=1e-3)
    assert abs(fitted.temperature / fitted.prior_temperatures["train"] - 1) > 0.01
    assert fitted.lean == 0


def test_the_lean_of_held_out_margins_is_taken_out_of_what_is_served(digits_run: RunFolder, digits: Dataset) -> None:
    (leaning, before), (network, fitted) = (
        _calibrated(digits_run, digits, f"calibrate.marc_lean={lean}") for lean in ("false", "true")
    )
    prior = digits.train_counts() / digits.train_counts().sum()
    with torch.no_grad():
        held = leaning.calibrate(predict_logits(leaning, digits.holdout))
        logits = predict_logits(network, digits.test)
        margins, served = leaning.calibrate(logits).double(), network.calibrate(logits).double()
    expected = fit_lean(held, digits.holdout.labels, prior, 0.3)
    assert (fitted.lean, fitted.temperature) == pytest.approx(expected, rel=1e-3) and abs(fitted.lean) > 0.01
    probabilities = (margins / fitted.temperature).softmax(dim=1).numpy() / prior**fitted.lean
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    found = (served / fitted.temperature).softmax(dim=1).numpy()
    np.testing.assert_allclose(found, probabilities, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(network.marc.omega, leaning.marc.omega)
    assert fitted.prior_temperatures["train"] != before.prior_temperatures["train"]


def test_a_selected_scalar_changes_logits_by_its_factor_and_nothing_else(
    digits_run: RunFolder, digits: Dataset
) -> None:
    network, fitted = _calibrated(digits_run, digits)
    trained, _, _ = load_network(digits_run.checkpoint)
    part = LabelledImages(images=digits.test.images[:50], labels=digits.test.labels[:50])
    ours, theirs = predict_logits(network, part), predict_logits(trained, part)
    assert fitted.scalar != fitted.trained_scalar == trained.head.scalar.item()
    torch.testing.assert_close(ours, theirs * (fitted.scalar / fitted.trained_scalar), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network.rescale.undo(ours), theirs, rtol=1e-4, atol=1e-4)


def test_a_second_calibration_starts_from_the_trained_network(digits_run: RunFolder, digits: Dataset) -> None:
    network, first = _calibrated(digits_run, digits)
    second = calibrated(network, digits, load_recipe("digits", MARC))
    assert second.scalar == pytest.approx(first.scalar, rel=1e-4)
    assert second.temperature == pytest.approx(first.temperature, rel=1e-2)


def test_a_scalar_may_be_kept(digits_run: RunFolder, digits: Dataset) -> None:
    network, fitted = _calibrated(digits_run, digits, "calibrate.scalar=keep", "calibrate.method=temperature")
    assert fitted.scalar == fitted.trained_scalar and network.rescale.factor == 1
    assert fitted.train_accuracy is None


def test_a_network_that_says_nothing_finite_is_refused(digits_run: RunFolder, digits: Dataset) -> None:
    network, _, _ = load_network(digits_run.checkpoint)
    with torch.no_grad():
        network.head.weight[3, 0] = torch.nan
    with pytest.raises(CalibrationError, match="unless the trained network itself is broken"):
        calibrated(network, digits, load_recipe("digits", ["calibrate.method=temperature"]))


@pytest.mark.parametrize("margins", [["calibrate.method=shrunk"], [*MARC, "calibrate.marc_on=both"]])
def test_margins_from_a_single_held_out_image_are_refused(
    digits_run: RunFolder, digits: Dataset, margins: list[str]
) -> None:
    network, _, _ = load_network(digits_run.checkpoint)
    few = replace(digits, holdout=digits.holdout.subset(np.array([0])))
    with pytest.raises(CalibrationError, match="needs two held-out images, and there are 1: use calibrate.method = "):
        calibrated(network, few, load_recipe("digits", margins))


@pytest.mark.parametrize("held", [0, 1])
def test_with_hardly_a_held_out_image_nothing_is_compared(digits_run: RunFolder, digits: Dataset, held: int) -> None:
    network, _, _ = load_network(digits_run.checkpoint)
    few = replace(digits, holdout=digits.holdout.subset(np.arange(held)))
    fitted = calibrated(network, few, load_recipe("digits"))
    (only,) = fitted.candidates
    judged = only.nll, only.loss, only.difference, only.standard_error
    assert fitted.method == "temperature" and judged == (None, None, None, None)


def test_auto_serves_what_fits_unseen_images_best_or_a_simpler_one_that_ties(
    digits_run: RunFolder, digits: Dataset
) -> None:
    network, fitted = _calibrated(digits_run, digits, "calibrate.method=auto")
    assert [each.method for each in fitted.candidates] == ["temperature", "lean", "marc", "shrunk"]
    assert [each.numbers for each in fitted.candidates] == [1, 2, 21, 22]
    losses = {each.method: each.loss for each in fitted.candidates}
    (chosen,) = [each for each in fitted.candidates if each.method == fitted.method]
    assert (chosen.difference, chosen.standard_error) == (0, 0) and chosen.loss is not None
    for each in fitted.candidates:
        assert each.loss is not None and each.difference == pytest.approx(each.loss - chosen.loss)
        assert each.nll is not None and each.nll < each.loss  # a random label costs more
    best = min(losses, key=lambda method: losses[method] or 0)
    assert best == fitted.method or chosen.numbers < max(each.numbers for each in fitted.candidates)
    # What is served is what the fixed method gives.
    alone, same = _calibrated(digits_run, digits, f"calibrate.method={fitted.method}")
    assert [each.method for each in same.candidates] == [fitted.method]
    assert same.candidates[0].nll == pytest.approx(chosen.nll) and same.temperature == fitted.temperature
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], tensor, msg=name)


@pytest.mark.parametrize("method", ["temperature", "lean", "marc", "shrunk"])
def test_every_method_serves_the_candidate_in_the_report(digits_run: RunFolder, digits: Dataset, method: str) -> None:
    network, fitted = _calibrated(digits_run, digits, f"calibrate.method={method}")
    (only,) = fitted.candidates
    assert fitted.method == only.method == method
    logits = predict_logits(network, digits.test)
    with torch.no_grad():
        served = network.calibrate(logits) / network.temperature
    expected = (torch.tensor(only.omega) * logits + torch.tensor(only.offset)) / only.temperature
    torch.testing.assert_close(served, expected, rtol=1e-4, atol=1e-4)
    assert (fitted.lean != 0) == (method in ("lean", "shrunk"))


def test_auto_compares_no_marc_where_the_training_balances_already(digits_run: RunFolder, digits: Dataset) -> None:
    _, fitted = _calibrated(digits_run, digits, "calibrate.method=auto", "loss.name=balanced_softmax")
    assert [each.method for each in fitted.candidates] == ["temperature", "lean", "shrunk"]
    assert fitted.train_accuracy is None  # no logits of training images were needed


def test_without_margins_the_logarithm_of_the_prior_is_taken_out(digits_run: RunFolder, digits: Dataset) -> None:
    network, fitted = _calibrated(digits_run, digits, "calibrate.method=temperature")
    logits = predict_logits(network, digits.test)
    q = np.bincount(digits.train.labels.numpy()) / len(digits.train)
    np.testing.assert_allclose(fitted.logit_prior, q, rtol=1e-6)
    with torch.no_grad():
        adjusted = (network.calibrate(logits) / network.temperature).softmax(dim=1).numpy()
    expected = (logits.double() / fitted.temperature).softmax(dim=1).numpy() / q
    np.testing.assert_allclose(adjusted, expected / expected.sum(axis=1, keepdims=True), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("margins", ["calibrate.method=shrunk", "calibrate.marc_on=both"])
def test_margins_may_be_fitted_on_held_out_images(digits_run: RunFolder, digits: Dataset, margins: str) -> None:
    network, fitted = _calibrated(digits_run, digits, margins)
    assert (fitted.train_accuracy is None) == (margins == "calibrate.method=shrunk")
    logits = predict_logits(network, digits.test)
    with torch.no_grad():
        accuracy = [
            (z.argmax(dim=1) == digits.test.labels).double().mean() for z in (logits, network.calibrate(logits))
        ]
    assert accuracy[1] > accuracy[0] + 0.03
    assert 0.3 < fitted.temperature < 5 and fitted.penalty in PENALTIES
    # By default such margins stay near those of logit adjustment; without a start of their own they would not.
    offsets = (network.marc.beta * network.weight_norms()).detach()
    adjustment = -torch.tensor(fitted.logit_prior).mul(10).log().float()
    assert (offsets - adjustment).abs().mean() < (offsets - 0).abs().mean()


def test_margins_are_fitted_on_logits_that_differ_from_pass_to_pass(digits_run: RunFolder, digits: Dataset) -> None:
    network, recipe, _ = load_network(digits_run.network)
    cache = calibrate_module._Cache(
        TrainedLogits(network), digits, recipe.model_copy(update={"augment": AugmentConfig(shift=3)})
    )
    passes = cache.train_NK.chunk(recipe.calibrate.passes)
    plain = predict_logits(network, digits.train, trained=True)
    assert len(passes) > 1 and len(cache.train_labels) == len(cache.train_NK)
    for one in passes:
        assert (one - plain).abs().mean() > 0.01  # augmented
        assert sum(torch.equal(one, other) for other in passes) == 1


@pytest.mark.parametrize("rescale", ["tau", "lws"])
def test_a_linear_head_may_be_rescaled(digits: Dataset, digits_recipe: Recipe, rescale: str) -> None:
    settings = ["calibrate.iterations=300", "calibrate.method=temperature", "model.head=linear", "model.camc=off"]
    recipe = load_recipe("digits", [*settings, f"calibrate.rescale={rescale}"])
    network = build_network(recipe, 10).eval()
    with torch.no_grad():
        network.head.weight.mul_(torch.linspace(30, 3, 10)[:, None])
        network.head.bias.uniform_(-1, 1)
    trained = predict_logits(network, digits.test)
    fitted = calibrated(network, digits, recipe)
    found = predict_logits(network, digits.test)
    torch.testing.assert_close(network.rescale.undo(found), trained, rtol=1e-3, atol=1e-3)
    if rescale == "lws":
        scale_K = network.rescale.scale
        assert fitted.tau is None and scale_K.min() > 0 and network.rescale.shift.abs().max() == 0
        assert scale_K[:5].mean() < scale_K[5:].mean() < 0.1  # rows of length 30 to 3 are far too sure of themselves
        return
    assert [p.tau for p in fitted.tau_curve] == list(TAUS)
    best = min(fitted.tau_curve, key=lambda p: p.nll)
    labels = digits.holdout.labels.numpy()
    each = -predict_logits(network, digits.holdout).double().log_softmax(dim=1).numpy()[np.arange(len(labels)), labels]
    balanced = np.mean([each[labels == k].mean() for k in range(10)])  # every class alike, however many are held out
    assert fitted.tau == best.tau and best.nll == pytest.approx(balanced, rel=1e-4)
    # Each τ's scale is the mode under its prior, beside logits about as large as the trained ones.
    factor = float(network.rescale.scale.mean())
    at_one = predict_logits(network, digits.holdout).double().numpy() / factor
    assert factor == pytest.approx(_best_factor(at_one, labels, np.full(10, 0.1), np.zeros(10)), rel=1e-3)
    norms = network.head.weight.norm(dim=1)
    ratio = network.rescale.scale * norms**fitted.tau if fitted.tau else network.rescale.scale
    torch.testing.assert_close(ratio, ratio.mean().expand(10))
    torch.testing.assert_close(network.rescale.shift, -network.rescale.scale * network.head.bias)


@pytest.mark.parametrize("reslt", ["off", "cifar", "large", "large-official"])
def test_tau_norm_drops_the_bias_of_every_branch(digits: Dataset, reslt: str) -> None:
    settings = ["calibrate.method=temperature", "model.head=linear", "model.camc=off", f"model.reslt={reslt}"]
    recipe = load_recipe("digits", [*settings, "calibrate.rescale=tau"])
    network = build_network(recipe, 10).eval()
    with torch.no_grad():
        network.head.bias.copy_(torch.linspace(-3, 3, 10))
    calibrated(network, digits, recipe)
    torch.testing.assert_close(network.rows()[1], torch.zeros(10), rtol=0, atol=1e-5)


def test_tau_may_be_given(digits: Dataset) -> None:
    settings = ["calibrate.method=temperature", "model.head=linear", "calibrate.rescale=tau", "calibrate.tau=0.7"]
    recipe = load_recipe("digits", settings)
    network = build_network(recipe, 10).eval()
    with torch.no_grad():
        network.head.weight.mul_(torch.linspace(3, 1, 10)[:, None])
    fitted = calibrated(network, digits, recipe)
    assert fitted.tau == 0.7 and [point.tau for point in fitted.tau_curve] == [0.7]
    lengths = network.rows()[0].norm(dim=1) / network.head.weight.norm(dim=1) ** 0.3
    torch.testing.assert_close(lengths, lengths.mean().expand(10))


def test_a_linear_head_has_no_scalar_to_select(digits: Dataset) -> None:
    recipe = load_recipe("digits", ["model.head=linear", "model.camc=off", "calibrate.method=temperature"])
    fitted = calibrated(build_network(recipe, 10), digits, recipe)
    assert fitted.scalar == fitted.trained_scalar == 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("loss.name=balanced_softmax", "balances the classes already; MARC on top"),
        ("fit.sampler=class_balanced", "balances the classes already; MARC on top"),
        ("loss.weights=grw", "balances the classes already; MARC on top"),
        ("fit.sampler=square_root", None),
        ("loss.name=focal", None),
    ],
)
def test_marc_on_balanced_training_is_warned_about(
    digits_run: RunFolder, digits: Dataset, override: str, words: str | None
) -> None:
    _, fitted = _calibrated(digits_run, digits, override, "calibrate.iterations=2", "calibrate.passes=1")
    few, *rest = fitted.warnings
    assert few.startswith(
        f"only {len(digits.holdout)} images are held out, so scalar and temperature are rough estimates"
    )
    if words is None:
        assert not rest
    else:
        (found,) = rest
        assert words in found
    recipe = load_recipe("digits", [override])
    counts = np.bincount(digits.train.labels.numpy())
    np.testing.assert_allclose(fitted.logit_prior, logit_prior(recipe, counts))
    without = _calibrated(digits_run, digits, override, "calibrate.method=temperature")[1]
    assert without.warnings == [few]


def test_label_smoothing_is_warned_about_unless_a_lean_is_fitted(digits_run: RunFolder, digits: Dataset) -> None:
    _, found = _calibrated(digits_run, digits, "loss.smoothing=0.1", "calibrate.method=temperature")[1].warnings
    assert found.endswith("then favours rare classes; --set calibrate.method=lean corrects it")
    assert len(_calibrated(digits_run, digits, "loss.smoothing=0.1", "calibrate.method=lean")[1].warnings) == 1


def test_a_penalty_that_is_given_is_taken(digits_run: RunFolder, digits: Dataset) -> None:
    strong, fitted = _calibrated(digits_run, digits, "calibrate.method=shrunk", "calibrate.penalty=1e7")
    assert fitted.penalty == 1e7
    lean, leaning = _calibrated(digits_run, digits, "calibrate.method=lean")
    assert fitted.lean == leaning.lean
    logits = predict_logits(strong, digits.test)
    with torch.no_grad():
        ours, theirs = (net.calibrate(logits) / leaning.temperature for net in (strong, lean))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-2)
    assert _calibrated(digits_run, digits)[1].penalty == 0
