"""Figures of a classifier's probabilities, in float64 NumPy. N samples, K classes.

Every figure accepts weights per sample, so that a balanced test set can stand for one with another class prior.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


def softmax(logits_NK: NDArray[np.floating]) -> Floats:
    """Row-wise softmax in float64."""
    z = logits_NK.astype(np.float64)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


def per_class_accuracy(probabilities_NK: Floats, labels_N: Labels) -> Floats:
    """Top-1 accuracy of each class (its recall), K values; nan for a class without samples."""
    hits = (probabilities_NK.argmax(axis=1) == labels_N).astype(np.float64)
    classes = probabilities_NK.shape[1]
    counts = np.bincount(labels_N, minlength=classes)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.bincount(labels_N, weights=hits, minlength=classes) / counts)


def group_accuracy(per_class_K: Floats, groups_K: list[str]) -> dict[str, float | None]:
    """The mean of per-class accuracies in each group; None for a group without classes."""
    names = np.array(groups_K)
    result: dict[str, float | None] = {}
    for group in ("many", "medium", "few"):
        values = per_class_K[names == group]
        values = values[~np.isnan(values)]
        result[group] = float(values.mean()) if len(values) else None
    return result


class ReliabilityBin(TypedDict):
    """One bin of a reliability diagram: its share of the weight, mean confidence and accuracy."""

    low: float
    high: float
    share: float
    confidence: float | None
    accuracy: float | None


def reliability(confidence_N: Floats, correct_N: Floats, weights_N: Floats, bins: int = 15) -> list[ReliabilityBin]:
    """Equal-width bins (low, high] over [0, 1]; the first holds 0 as well."""
    index = np.clip(np.ceil(confidence_N * bins).astype(np.int64) - 1, 0, bins - 1)
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
        b["share"] * abs(b["confidence"] - b["accuracy"])
        for b in diagram
        if b["confidence"] is not None and b["accuracy"] is not None
    )
    return float(sum(gaps))


def top_label_reliability(probabilities_NK: Floats, labels_N: Labels, weights_N: Floats) -> list[ReliabilityBin]:
    """The reliability diagram of the predicted class."""
    correct = (probabilities_NK.argmax(axis=1) == labels_N).astype(np.float64)
    return reliability(probabilities_NK.max(axis=1), correct, weights_N)


def expected_calibration_error(probabilities_NK: Floats, labels_N: Labels, weights_N: Floats) -> float:
    """ECE of the predicted class, 15 equal-width bins (Guo et al., arXiv 1706.04599)."""
    return _gap(top_label_reliability(probabilities_NK, labels_N, weights_N))


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


class Figures(TypedDict):
    """All figures of one set of probabilities."""

    accuracy: float
    groups: dict[str, float | None]
    ece: float
    classwise_ece: float
    nll: float
    brier: float


def figures(
    probabilities_NK: Floats, labels_N: Labels, groups_K: list[str], weights_N: Floats | None = None
) -> Figures:
    """Accuracy overall and per group, and the four measures of calibration.

    Raises:
        ValueError: if there are no samples, or the lengths differ.
    """
    if not len(labels_N) or len(labels_N) != len(probabilities_NK):
        raise ValueError(f"{len(probabilities_NK)} probabilities for {len(labels_N)} labels")
    weights = np.ones(len(labels_N)) if weights_N is None else weights_N
    correct = (probabilities_NK.argmax(axis=1) == labels_N).astype(np.float64)
    return Figures(
        accuracy=float(weights @ correct / weights.sum()),
        groups=group_accuracy(per_class_accuracy(probabilities_NK, labels_N), groups_K),
        ece=expected_calibration_error(probabilities_NK, labels_N, weights),
        classwise_ece=classwise_calibration_error(probabilities_NK, labels_N, weights),
        nll=negative_log_likelihood(probabilities_NK, labels_N, weights),
        brier=brier_score(probabilities_NK, labels_N, weights),
    )
