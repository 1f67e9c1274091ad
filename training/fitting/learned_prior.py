"""The class prior that a network's logits are for, from how it was trained. K classes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from camcal.models.bundle import PlainPrior
from camcal.training.fitting.losses import class_weights, log_prior
from camcal.training.fitting.samplers import class_shares
from camcal.training.priors import Floats, even_prior
from camcal.training.recipe import Recipe


def logit_prior(recipe: Recipe, counts_K: NDArray[np.int64]) -> Floats:
    """The class prior q that softmax of the trained logits is for, K values.

    A network learns the posterior under the prior r_k ∝ (share of class k among the samples drawn)·(weight of class k).
    If log-priors τ·log π are added in training, q_k ∝ r_k/π_k^τ. Plain cross-entropy gives q = π, balanced softmax a
    uniform q. LDAM's margins, focal loss and label smoothing have no known effect on the prior and count as
    cross-entropy. ResLT's branches are taken to balance the classes, as in its paper. The last epoch counts.

    Args:
        counts_K: of the images trained on.
    """
    if recipe.model.reslt != "off":
        return even_prior(len(counts_K))
    progress = 1 - 1 / recipe.fit.epochs
    prior_K = class_shares(recipe.fit.sampler, counts_K, progress)
    if progress >= recipe.loss.reweight_from:
        prior_K = prior_K * class_weights(recipe.loss, counts_K).double().numpy()
    prior_K = prior_K / np.exp(log_prior(recipe.loss, counts_K).double().numpy())
    return np.asarray(prior_K / prior_K.sum())


def plain_prior(recipe: Recipe, counts_K: NDArray[np.int64]) -> PlainPrior:
    """The name of the prior that softmax of the logits is for, once a linear head is rescaled if the recipe says so."""
    prior_K = logit_prior(recipe, counts_K)
    if recipe.calibrate.rescale != "off" or np.allclose(prior_K, 1 / len(counts_K)):
        return "balanced"
    return "train" if np.allclose(prior_K, counts_K / counts_K.sum()) else "other"


def is_balanced(prior_K: Floats, counts_K: NDArray[np.int64]) -> bool:
    """Whether a prior is nearer to the uniform one than to the frequencies `counts_K`, or favours the rare classes."""
    return bool(np.ptp(counts_K) > 0 and _lean(prior_K, counts_K) < 0.5 - 1e-9)


def balanced_twice(prior_K: Floats, counts_K: NDArray[np.int64]) -> str | None:
    """A warning about a prior that strongly favours the rare classes; None for others."""
    if np.ptp(counts_K) == 0 or _lean(prior_K, counts_K) >= -0.5:
        return None
    return (
        "loss, class weights and sampler together balance the classes more than once and favour the rare ones, which "
        "usually costs accuracy: drop one of them"
    )


def _lean(prior_K: Floats, counts_K: NDArray[np.int64]) -> float:
    """The slope of log q against log n: 1 for the frequencies themselves, 0 for the uniform prior."""
    return float(np.polyfit(np.log(counts_K), np.log(prior_K), 1)[0])
