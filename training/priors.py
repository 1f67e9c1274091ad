"""Class priors: which one the trained logits are for, and probabilities for another. N samples, K classes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from camcal.training.config import Recipe
from camcal.training.losses import class_weights, log_prior
from camcal.training.samplers import class_shares

Floats = NDArray[np.float64]


def even_prior(classes: int) -> Floats:
    """Every class as frequent as another, K values."""
    return np.full(classes, 1 / classes)


def logit_prior(recipe: Recipe, counts_K: NDArray[np.int64]) -> Floats:
    """The class prior q that softmax of the trained logits is for, K values.

    A network learns the posterior under the prior r_k ∝ (share of class k among the samples drawn)·(weight of class k).
    Where log-priors τ·log π are added while training, they have taken their part of it: q_k ∝ r_k/π_k^τ. Plain
    cross-entropy gives q = π, balanced softmax an even q. LDAM's margins, focal loss and label smoothing shift no prior
    by a rule and count as cross-entropy. ResLT's branches for rarer classes move the logits away from π by no rule
    either; they are taken as in its paper, for the even prior. The last epoch decides.

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


def is_balanced(prior_K: Floats, counts_K: NDArray[np.int64]) -> bool:
    """Whether a prior is nearer to the even one than to the frequencies `counts_K`, or leans to the rare classes."""
    return bool(np.ptp(counts_K) > 0 and _lean(prior_K, counts_K) < 0.5 - 1e-9)


def balanced_twice(prior_K: Floats, counts_K: NDArray[np.int64]) -> str | None:
    """A sentence about a prior that leans to the rare classes as far as would be worth balancing; None for others."""
    if np.ptp(counts_K) == 0 or _lean(prior_K, counts_K) >= -0.5:
        return None
    return (
        "loss, class weights and sampler together balance the classes more than once, and favour the rare ones; this "
        "mostly costs accuracy: drop one of them"
    )


def _lean(prior_K: Floats, counts_K: NDArray[np.int64]) -> float:
    """The slope of log q against log n: 1 for the frequencies themselves, 0 for the even prior."""
    return float(np.polyfit(np.log(counts_K), np.log(prior_K), 1)[0])


def shift_prior(probabilities_NK: Floats, ratio_K: Floats) -> Floats:
    """Probabilities for one prior, turned into those for another that is `ratio_K` times it: p_k·ratio_k, normalised.

    From a balanced prior, `ratio_K` is the wanted prior itself.
    """
    shifted = probabilities_NK * ratio_K
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def prior_weights(labels_N: NDArray[np.int64], prior_K: Floats) -> Floats:
    """Weights under which these samples have the class frequencies `prior_K`, as far as a class has samples."""
    shares = np.bincount(labels_N, minlength=len(prior_K)) / max(len(labels_N), 1)
    return np.asarray((prior_K / np.where(shares > 0, shares, 1))[labels_N])


def given_prior(wanted: list[float] | dict[str, float], classes: list[str]) -> Floats:
    """A prior as a recipe gives it (`calibrate.prior`), in the classes' order and summing to one, K values.

    Raises:
        ValueError: if a class is missing or unknown, or a number is not positive.
    """
    if isinstance(wanted, dict):
        if unknown := [name for name in wanted if name not in classes]:
            raise ValueError(f"calibrate.prior names {unknown[0]!r}, which is not a class")
        if missing := [name for name in classes if name not in wanted]:
            raise ValueError(f"calibrate.prior has no number for class {missing[0]!r}")
        wanted = [wanted[name] for name in classes]
    if len(wanted) != len(classes):
        raise ValueError(f"calibrate.prior has {len(wanted)} numbers for {len(classes)} classes")
    prior_K = np.array(wanted, dtype=np.float64)
    if prior_K.min() <= 0:
        raise ValueError(f"calibrate.prior must be positive for every class, got {prior_K.min():g}")
    return np.asarray(prior_K / prior_K.sum())
