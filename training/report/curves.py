"""Curves for the report: the effect of other scalars."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from camcal.training import metrics


def scalars_around(selected: float) -> list[float]:
    """From an eighth of the selected scalar to eight times it, in steps of √2, and closer beside it."""
    return [selected * 2 ** (e / 8) for e in (*range(-24, -3, 4), -2, -1, 0, 1, 2, *range(4, 25, 4))]


def scalar_curve(
    cosines_NK: metrics.Floats,
    labels_N: metrics.Labels,
    weights_N: metrics.Floats,
    prior_K: metrics.Floats,
    scalars: Sequence[float],
) -> list[dict[str, float]]:
    """Accuracy, ECE and NLL of softmax(s·cos), with and without the class prior, for each s of `scalars`.

    A scalar alone never changes the order of the classes; it does so through the prior, in softmax(s·cos - log q).

    Args:
        cosines_NK: logits over their scalar.
        weights_N: weights of the samples, for the class frequencies of the evaluation.
        prior_K: q, the class prior that the logits are for.
    """
    points = []
    correct_N = (cosines_NK.argmax(axis=1) == labels_N).astype(np.float64)
    for scalar in scalars:
        plain = metrics.softmax(scalar * cosines_NK)
        adjusted = metrics.softmax(scalar * cosines_NK - np.log(prior_K))
        hits_N = (adjusted.argmax(axis=1) == labels_N).astype(np.float64)
        points.append(
            {
                "scalar": scalar,
                "accuracy": float(weights_N @ correct_N / weights_N.sum()),
                "ece": metrics.expected_calibration_error(plain, labels_N, weights_N),
                "nll": metrics.negative_log_likelihood(plain, labels_N, weights_N),
                "adjusted_accuracy": float(weights_N @ hits_N / weights_N.sum()),
                "adjusted_ece": metrics.expected_calibration_error(adjusted, labels_N, weights_N),
                "adjusted_nll": metrics.negative_log_likelihood(adjusted, labels_N, weights_N),
            }
        )
    return points
