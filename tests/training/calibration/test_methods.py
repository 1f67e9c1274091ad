from dataclasses import replace

import numpy as np
import pytest
import torch

from camcal.training.calibration.methods import PENALTIES, FitData, Methods, choose, wanted
from camcal.training.calibration.temperature import fit_temperature
from camcal.training.priors import even_prior
from camcal.training.recipe import load_recipe

COUNTS = np.array([400, 120, 40, 12, 4])
PRIOR = COUNTS / COUNTS.sum()


def _data(held: int, lean: float = 0.0, bent: bool = False, seed: int = 0) -> FitData:
    """Logits whose posterior under PRIOR is softmax(z/1.5 - lean·log π); bent, with a scale and shift per class."""
    random = np.random.default_rng(seed)
    labels = random.choice(5, held, p=PRIOR)
    labels[:5] = np.arange(5)
    balanced = 1.5 * (random.normal(size=(held, 5)) + 1.5 * np.eye(5)[labels])
    logits = 1.5 * (balanced + (1 + lean) * np.log(PRIOR))
    if bent:
        logits = logits / np.array([0.4, 0.7, 1.0, 1.6, 2.5]) + np.array([3.0, -3.0, 2.0, -2.0, 0.0])

    def training() -> None:
        raise AssertionError("these methods need no training images")

    return FitData(
        held_NK=torch.from_numpy(logits).float(),
        held_labels_N=torch.from_numpy(labels),
        prior_K=PRIOR,
        weight_norms_K=torch.ones(5),
        train_prior_K=PRIOR,
        training=training,  # type: ignore[arg-type]
    )


def _methods(data: FitData, *overrides: str) -> Methods:
    return Methods(load_recipe("digits", list(overrides)), data)


def test_the_methods_are_nested_by_their_numbers() -> None:
    methods = _methods(_data(2000))
    assert [methods.fit(name).numbers for name in ("temperature", "lean", "shrunk")] == [1, 2, 12]


def test_cross_fitted_losses_are_of_fits_that_never_saw_the_image() -> None:
    """Labels of one part are changed: its own losses follow, by the fit of before."""
    data = _data(300)
    methods = _methods(data)
    part = methods.parts[0]
    before = methods.fit("temperature").losses_N[part.numpy()]
    others = torch.cat(methods.parts[1:])
    labels = data.held_labels_N
    z = data.held_NK.double()
    temperature = fit_temperature(z[others], labels[others], even_prior(5), 0.3, PRIOR)
    balanced = z[part] / temperature - torch.from_numpy(np.log(PRIOR))
    surprise = -balanced.log_softmax(dim=1).numpy()
    share = 1 / (methods.weights_N.sum() ** 2 / (methods.weights_N**2).sum() + 1)  # of an image of a random label
    own = surprise[np.arange(len(part)), labels[part].numpy()]
    np.testing.assert_allclose(before, (1 - share) * own + share * surprise.mean(axis=1), rtol=1e-5)


@pytest.mark.parametrize(("lean", "bent", "best"), [(0.0, False, "temperature"), (0.5, False, "lean")])
def test_the_form_that_the_logits_have_is_found(lean: float, bent: bool, best: str) -> None:
    methods = _methods(_data(4000, lean, bent), "calibrate.spread=10")
    chosen = choose([methods.fit(name) for name in ("temperature", "lean", "shrunk")], methods.weights_N)
    assert chosen.method == best
    assert chosen.lean == pytest.approx(lean, abs=0.1) and chosen.temperature == pytest.approx(1.5, rel=0.05)


def test_margins_of_each_class_are_found_where_there_are_images_enough() -> None:
    methods = _methods(_data(8000, bent=True))
    fits = {name: methods.fit(name) for name in ("temperature", "lean", "shrunk")}
    chosen = choose(list(fits.values()), methods.weights_N)
    assert chosen.method == "shrunk" and chosen.penalty in PENALTIES
    mean = {name: methods.weights_N @ fit.losses_N / methods.weights_N.sum() for name, fit in fits.items()}
    assert mean["shrunk"] < mean["lean"] - 0.05
    omega = chosen.margins.omega_K.numpy() / chosen.temperature
    np.testing.assert_allclose(omega[:3], np.array([0.4, 0.7, 1.0]) / 1.5, rtol=0.25)


@pytest.mark.parametrize("seed", range(5))
def test_from_few_images_no_margins_are_taken(seed: int) -> None:
    methods = _methods(_data(60, lean=0.3, seed=seed))
    shrunk, lean = methods.fit("shrunk"), methods.fit("lean")
    assert shrunk.lean == lean.lean and np.isfinite(shrunk.losses_N).all()
    assert choose([lean, shrunk], methods.weights_N).method == "lean"


def test_a_few_images_that_are_all_right_are_no_evidence_for_confident_margins() -> None:
    random = np.random.default_rng(0)
    labels = np.arange(25) % 5
    logits = 2 * random.normal(size=(25, 5)) + 9 * np.eye(5)[labels]
    assert (logits.argmax(axis=1) == labels).all()
    data = replace(
        _data(25),
        held_NK=torch.from_numpy(logits).float(),
        held_labels_N=torch.from_numpy(labels),
        prior_K=even_prior(5),
    )
    methods = _methods(data)
    fits = [methods.fit(name) for name in ("temperature", "shrunk")]
    assert choose(fits, methods.weights_N).method == "temperature"
    methods.doubt = 0.0
    careless = [methods.fit(name) for name in ("temperature", "shrunk")]
    assert choose(careless, methods.weights_N).method == "shrunk"


def test_auto_compares_what_can_pay() -> None:
    auto, fixed = load_recipe("digits"), load_recipe("digits", ["calibrate.method=shrunk"])
    even = even_prior(5)
    assert wanted(auto, PRIOR, COUNTS, 300) == ["temperature", "lean", "marc", "shrunk"]
    assert wanted(auto, even, COUNTS, 300) == ["temperature", "lean", "shrunk"]
    assert wanted(auto, PRIOR, COUNTS, 2**24) == ["temperature", "lean", "marc"]
    assert wanted(auto, PRIOR, COUNTS, 1) == ["temperature"]
    assert wanted(fixed, PRIOR, COUNTS, 0) == ["shrunk"]
    rescaled = load_recipe("digits", ["model.head=linear", "model.camc=off", "calibrate.rescale=tau"])
    assert wanted(rescaled, PRIOR, COUNTS, 300) == ["temperature", "lean", "shrunk"]
