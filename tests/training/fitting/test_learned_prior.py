from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from camcal.training.fitting import losses
from camcal.training.fitting.learned_prior import balanced_twice, is_balanced, logit_prior, plain_prior
from camcal.training.priors import shift_prior
from camcal.training.recipe import Recipe, load_recipe

Floats = np.ndarray[Any, np.dtype[np.float64]]
COUNTS = np.array([400, 36, 4])
PI = COUNTS / 440
EVEN = np.full(3, 1 / 3)


def _recipe(*overrides: str) -> Recipe:
    return load_recipe("digits", overrides)


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ([], PI),
        (["loss.name=balanced_softmax"], EVEN),
        (["loss.name=logit_adjustment", "loss.tau=0.5"], PI**0.5),
        (["loss.weights=grw", "loss.exponent=0.8"], PI**0.2),
        (["fit.sampler=class_balanced"], EVEN),
        (["fit.sampler=square_root"], PI**0.5),
        (["loss.weights=grw", "loss.exponent=1", "loss.reweight_from=0.5"], EVEN),
        (["loss.name=balanced_softmax", "fit.sampler=class_balanced"], 1 / PI),
        (["fit.sampler=progressive", "fit.epochs=4"], 0.25 * PI + 0.75 / 3),
        (["model.reslt=cifar"], EVEN),
    ],
)
def test_the_prior_that_trained_logits_are_for(overrides: list[str], wanted: Floats) -> None:
    np.testing.assert_allclose(logit_prior(_recipe(*overrides), COUNTS), wanted / wanted.sum(), rtol=1e-5)
    names = {id(PI): "train", id(EVEN): "balanced"}
    expected = "balanced" if np.allclose(wanted / wanted.sum(), EVEN) else names.get(id(wanted), "other")
    assert plain_prior(_recipe(*overrides), COUNTS) == expected


def test_rescaled_logits_are_for_the_balanced_prior() -> None:
    recipe = _recipe("model.head=linear", "model.camc=off", "calibrate.rescale=tau")
    assert plain_prior(recipe, COUNTS) == "balanced"
    assert plain_prior(_recipe(), np.array([7, 7, 7])) == "balanced"


def test_who_minimises_the_training_loss_has_probabilities_under_that_prior() -> None:
    # Two inputs x with known p(x|k). The expected loss, weighted n^-0.4 and adjusted by 0.7·log π, is minimised over z.
    likelihood_XK = np.array([[0.8, 0.5, 0.1], [0.2, 0.5, 0.9]])
    mass_XK = likelihood_XK * PI * PI**-0.4

    def loss(z: Floats) -> float:
        adjusted = z.reshape(2, 3) + 0.7 * np.log(PI)
        return float((mass_XK * (np.log(np.exp(adjusted).sum(axis=1, keepdims=True)) - adjusted)).sum())

    best_XK = np.exp(minimize(loss, np.zeros(6), tol=1e-12).x.reshape(2, 3))
    overrides = ("loss.name=logit_adjustment", "loss.tau=0.7", "loss.weights=grw", "loss.exponent=0.4")
    expected = likelihood_XK * logit_prior(_recipe(*overrides), COUNTS)
    np.testing.assert_allclose(
        best_XK / best_XK.sum(axis=1, keepdims=True), expected / expected.sum(axis=1, keepdims=True), atol=1e-4
    )


@pytest.mark.parametrize("smoothing", [["loss.smoothing=0.1"], ["loss.smoothing=0.4", "loss.smoothing_tail=0.1"]])
def test_under_label_smoothing_taking_the_prior_out_favours_the_rare(smoothing: list[str]) -> None:
    # Of an input that says nothing, the loss is least at p = Σ_j π_j·[(1-ε_j)·e_j + ε_j/K].
    recipe = _recipe(*smoothing)
    spread_K = losses.smoothing(recipe.loss, COUNTS).double().numpy()
    learned_K = PI * (1 - spread_K) + (PI * spread_K).sum() / 3
    logits = torch.from_numpy(learned_K).log().requires_grad_()
    criterion = losses.Criterion(recipe.loss, COUNTS, torch.ones(()))
    labels = torch.repeat_interleave(torch.arange(3), torch.from_numpy(COUNTS))
    (slope_K,) = torch.autograd.grad(criterion(logits.expand(len(labels), 3), labels), logits)
    assert slope_K.abs().max() < 1e-6
    balanced_K = shift_prior(learned_K[None], 1 / logit_prior(recipe, COUNTS))[0]
    assert balanced_K[2] > 2 / 3 and balanced_K[0] < 0.15


def test_what_counts_as_balanced() -> None:
    assert is_balanced(EVEN, COUNTS)
    assert is_balanced(PI**0.2, COUNTS) and not is_balanced(PI**0.5, COUNTS) and not is_balanced(PI, COUNTS)
    assert is_balanced(1 / PI, COUNTS)
    assert not is_balanced(EVEN, np.array([5, 5, 5]))


def test_what_counts_as_balanced_twice() -> None:
    twice = balanced_twice(1 / PI, COUNTS)
    assert twice is not None and "balance the classes more than once" in twice
    for prior in (PI, EVEN, PI**-0.2):
        assert balanced_twice(prior, COUNTS) is None
    assert balanced_twice(EVEN, np.array([5, 5, 5])) is None
