"""Figures of a classifier's probabilities, in float64 NumPy. N samples, K classes.

Every figure takes a weight per sample, so that a balanced test set can represent another class prior.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

from camcal.models.report import CalibrationErrors, Figures, GroupCalibration, ReliabilityBin

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

BINS = 15
DRAWS = 500
"""Of the bootstrap, and of the error by chance."""


def softmax(logits_NK: NDArray[np.floating]) -> Floats:
    """Row-wise softmax in float64."""
    return np.asarray(special.softmax(logits_NK.astype(np.float64), axis=1))


def per_class_accuracy(probabilities_NK: Floats, labels_N: Labels) -> Floats:
    """Top-1 accuracy of each class (its recall), K values; nan for a class without samples."""
    hits = (probabilities_NK.argmax(axis=1) == labels_N).astype(np.float64)
    classes = probabilities_NK.shape[1]
    counts = np.bincount(labels_N, minlength=classes)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.bincount(labels_N, weights=hits, minlength=classes) / counts)


def group_accuracy(
    per_class_K: Floats, groups_K: list[str], names: Sequence[str] = ("many", "medium", "few")
) -> dict[str, float | None]:
    """The mean of per-class accuracies in each group of `names`; None for a group without classes."""
    group_of_K = np.array(groups_K)
    result: dict[str, float | None] = {}
    for group in names:
        values = per_class_K[group_of_K == group]
        values = values[~np.isnan(values)]
        result[group] = float(values.mean()) if len(values) else None
    return result


RANK_GROUPS = ("head", "middle", "tail")


def ranks(counts_K: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each class's rank by number of images, 0 for the most frequent; ties keep their order. K values."""
    ranks_K = np.empty(len(counts_K), dtype=np.int64)
    ranks_K[np.argsort(-counts_K, kind="stable")] = np.arange(len(counts_K))
    return ranks_K


def rank_groups(counts_K: NDArray[np.int64]) -> list[str]:
    """Each class's group by rank: the most frequent 36 % of the classes, the next 35 %, and the rest.

    For 10 classes these are [0, 3) [3, 7) [7, 10), for 100 [0, 36) [36, 71) [71, 100), the usual split of long-tailed
    CIFAR. Unlike thresholds on counts, ranks leave no group empty from three classes on; two classes are head
    and tail.
    """
    classes = len(counts_K)
    bounds = (max(1, classes * 36 // 100), classes * 71 // 100)
    return [RANK_GROUPS[int(np.searchsorted(bounds, rank, side="right"))] for rank in ranks(counts_K)]


def per_class_spread(values_N: Floats, labels_N: Labels, classes: int) -> tuple[Floats, Floats]:
    """Mean and standard deviation of a value over the samples of each class, K values each; nan without samples."""
    groups = [values_N[labels_N == k] for k in range(classes)]
    mean_K = np.array([g.mean() if len(g) else np.nan for g in groups])
    return mean_K, np.array([g.std() if len(g) else np.nan for g in groups])


def taken_for(predicted_N: Labels, labels_N: Labels, label: int, most: int = 3) -> list[tuple[int, float]]:
    """The classes that samples of `label` are most often mistaken for, with their shares, most frequent first."""
    found = predicted_N[labels_N == label]
    counts = np.bincount(found[found != label])
    order = np.argsort(-counts, kind="stable")[:most]
    return [(int(k), float(counts[k] / len(found))) for k in order if counts[k]]


def _bin_of(confidence_N: Floats, bins: int) -> Labels:
    """Equal-width bins (low, high] over [0, 1]; the first holds 0 as well."""
    return np.asarray(np.clip(np.ceil(confidence_N * bins).astype(np.int64) - 1, 0, bins - 1))


def reliability(confidence_N: Floats, correct_N: Floats, weights_N: Floats, bins: int = BINS) -> list[ReliabilityBin]:
    """Share, mean confidence and accuracy of each bin."""
    index = _bin_of(confidence_N, bins)
    total = weights_N.sum()
    result: list[ReliabilityBin] = []
    for b in range(bins):
        weights = np.where(index == b, weights_N, 0.0)
        mass = float(weights.sum())
        result.append(
            ReliabilityBin(
                low=b / bins,
                high=(b + 1) / bins,
                share=float(mass / total),
                confidence=float(weights @ confidence_N / mass) if mass else None,
                accuracy=float(weights @ correct_N / mass) if mass else None,
            )
        )
    return result


def _gap(diagram: list[ReliabilityBin]) -> float:
    gaps = (
        b.share * abs(b.confidence - b.accuracy) for b in diagram if b.confidence is not None and b.accuracy is not None
    )
    return float(sum(gaps))


def top_label_reliability(probabilities_NK: Floats, labels_N: Labels, weights_N: Floats) -> list[ReliabilityBin]:
    """The reliability diagram of the predicted class."""
    correct = (probabilities_NK.argmax(axis=1) == labels_N).astype(np.float64)
    return reliability(probabilities_NK.max(axis=1), correct, weights_N)


def expected_calibration_error(probabilities_NK: Floats, labels_N: Labels, weights_N: Floats) -> float:
    """ECE of the predicted class, 15 equal-width bins (Guo et al., arXiv 1706.04599)."""
    return _gap(top_label_reliability(probabilities_NK, labels_N, weights_N))


def calibration_by_group(
    probabilities_NK: Floats,
    labels_N: Labels,
    groups_K: list[str],
    weights_N: Floats,
    names: Sequence[str] = ("many", "medium", "few"),
) -> dict[str, GroupCalibration | None]:
    """Confidence, accuracy and ECE by the group of the predicted class; None for a group that is never predicted.

    The predicted class is what a user knows. Perfect probabilities have equal confidence and accuracy in each group of
    predictions, but not in each group of true classes.
    """
    group_of_N = np.array(groups_K)[probabilities_NK.argmax(axis=1)]
    result: dict[str, GroupCalibration | None] = {}
    for group in names:
        p_NK, y_N, w_N = (values[group_of_N == group] for values in (probabilities_NK, labels_N, weights_N))
        if not (mass := float(w_N.sum())):
            result[group] = None
            continue
        result[group] = GroupCalibration(
            share=mass / float(weights_N.sum()),
            confidence=float(w_N @ p_NK.max(axis=1) / mass),
            accuracy=float(w_N @ (p_NK.argmax(axis=1) == y_N) / mass),
            **calibration_errors(p_NK, y_N, w_N).model_dump(),
        )
    return result


def calibration_errors(probabilities_NK: Floats, labels_N: Labels, weights_N: Floats) -> CalibrationErrors:
    """ECE of the predicted class, and what the number of samples does to it.

    - A bin's gap is an absolute value, so chance alone gives an error: `ece_by_chance` is its expectation if each
      prediction were correct with exactly its confidence.
    - `ece_debiased` subtracts the bias, as estimated by Kumar et al. (arXiv 1909.10155, `normal_debiased_ce` of their
      library): in each bin, how much larger |x - confidence| is on average than |accuracy - confidence|, where x is
      normal around the accuracy with its standard error, √(a(1-a)/n) with n = (Σw)²/Σw². Their resampling is replaced
      by the mean of a folded normal, and equal-width bins are kept; Roelofs et al. (arXiv 2012.08668) judge it. A part
      of the bias is left where probabilities are near perfect.
    - `ece_interval` is the basic bootstrap interval (Davison and Hinkley, 1997, 5.2): 2·ECE minus the quantiles of
      resampled test sets. Quantiles themselves would have the bias twice, and cover nothing.
    """
    confidence_N = probabilities_NK.max(axis=1)
    index = _bin_of(confidence_N, BINS)
    correct_N = (probabilities_NK.argmax(axis=1) == labels_N).astype(np.float64)
    weights_NB = np.zeros((len(labels_N), BINS))
    weights_NB[np.arange(len(labels_N)), index] = weights_N / weights_N.sum()
    gaps_B = (confidence_N - correct_N) @ weights_NB
    ece = float(np.abs(gaps_B).sum())
    resampled = _resampled(len(labels_N))
    gaps_RB = (
        resampled @ ((confidence_N - correct_N)[:, None] * weights_NB) / (resampled @ weights_NB.sum(axis=1))[:, None]
    )
    low, high = np.quantile(np.abs(gaps_RB).sum(axis=1), (0.025, 0.975))
    return CalibrationErrors(
        ece=ece,
        ece_by_chance=_error_by_chance(confidence_N, weights_NB),
        ece_debiased=max(0.0, ece - _bias(gaps_B, correct_N, weights_NB)),
        ece_interval=(max(0.0, float(2 * ece - high)), max(0.0, float(2 * ece - low))),
    )


@lru_cache(maxsize=4)
def _resampled(samples: int) -> NDArray[np.float32]:
    """How often each sample is in each of `DRAWS` samples with replacement."""
    random = np.random.default_rng(0)
    drawn = (np.bincount(random.integers(samples, size=samples), minlength=samples) for _ in range(DRAWS))
    return np.stack([counts.astype(np.float32) for counts in drawn])


def _error_by_chance(confidence_N: Floats, weights_NB: Floats) -> float:
    random = np.random.default_rng(0)
    expected_B, chances_N = confidence_N @ weights_NB, confidence_N.astype(np.float32)
    weights = weights_NB.astype(np.float32)
    right = ((random.random(len(chances_N), dtype=np.float32) < chances_N).astype(np.float32) for _ in range(DRAWS))
    return float(np.mean([np.abs(right_N @ weights - expected_B).sum() for right_N in right]))


def _bias(gaps_B: Floats, correct_N: Floats, weights_NB: Floats) -> float:
    mass_B = weights_NB.sum(axis=0)
    accuracy_B = np.clip(correct_N @ weights_NB / np.maximum(mass_B, 1e-300), 0, 1)
    error_B = np.sqrt((weights_NB**2).sum(axis=0) * accuracy_B * (1 - accuracy_B))  # of the gap: mass times that of x
    size_B = np.abs(gaps_B)
    ratio_B = np.minimum(size_B / np.maximum(error_B, 1e-300), 40)  # beyond, there is no bias
    mean_B = error_B * np.sqrt(2 / np.pi) * np.exp(-(ratio_B**2) / 2) + size_B * special.erf(ratio_B / np.sqrt(2))
    return float((mean_B - size_B).sum())


def classwise_calibration_error(probabilities_NK: Floats, labels_N: Labels, weights_N: Floats) -> float:
    """The mean over classes of the ECE of each class's own probability (Kull et al., arXiv 1910.12656)."""
    classes = probabilities_NK.shape[1]
    errors = [
        _gap(reliability(probabilities_NK[:, k], (labels_N == k).astype(np.float64), weights_N)) for k in range(classes)
    ]
    return float(np.mean(errors))


def negative_log_likelihood(probabilities_NK: Floats, labels_N: Labels, weights_N: Floats) -> float:
    """The weighted mean of -log p(label), in nats."""
    chosen = probabilities_NK[np.arange(len(labels_N)), labels_N]
    return float(weights_N @ -np.log(np.maximum(chosen, 1e-300)) / weights_N.sum())


def brier_score(probabilities_NK: Floats, labels_N: Labels, weights_N: Floats) -> float:
    """The weighted mean of Σ_k (p_k - 1[k = label])²: 0 to 2."""
    target = np.zeros_like(probabilities_NK)
    target[np.arange(len(labels_N)), labels_N] = 1
    return float(weights_N @ ((probabilities_NK - target) ** 2).sum(axis=1) / weights_N.sum())


def figures(probabilities_NK: Floats, labels_N: Labels, groups_K: list[str], weights_N: Floats) -> Figures:
    """Accuracy overall and per group, and the four measures of calibration.

    Raises:
        ValueError: if there are no samples, or the lengths differ.
    """
    if not len(labels_N) or len(labels_N) != len(probabilities_NK):
        raise ValueError(f"{len(probabilities_NK)} probabilities for {len(labels_N)} labels")
    correct = (probabilities_NK.argmax(axis=1) == labels_N).astype(np.float64)
    return Figures(
        accuracy=float(weights_N @ correct / weights_N.sum()),
        groups=group_accuracy(per_class_accuracy(probabilities_NK, labels_N), groups_K),
        **calibration_errors(probabilities_NK, labels_N, weights_N).model_dump(),
        classwise_ece=classwise_calibration_error(probabilities_NK, labels_N, weights_N),
        nll=negative_log_likelihood(probabilities_NK, labels_N, weights_N),
        brier=brier_score(probabilities_NK, labels_N, weights_N),
    )
