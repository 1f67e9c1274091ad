"""Class priors, and probabilities for one or another. N samples, K classes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def even_prior(classes: int) -> Floats:
    """The uniform prior, K values."""
    return np.full(classes, 1 / classes)


def shift_prior(probabilities_NK: Floats, ratio_K: Floats) -> Floats:
    """Probabilities for one prior, turned into those for another that is `ratio_K` times it: p_k·ratio_k, normalised.

    From a balanced prior, `ratio_K` is the wanted prior itself.
    """
    shifted = probabilities_NK * ratio_K
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def prior_weights(labels_N: NDArray[np.int64], prior_K: Floats) -> Floats:
    """Weights under which these samples have the class frequencies `prior_K`; classes without samples are left out."""
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
