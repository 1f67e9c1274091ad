"""Comparison of fits by images that they have not seen. N samples, K classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from camcal.training.priors import Floats

FOLDS = 5


def folds(labels_N: Tensor, count: int = FOLDS) -> list[Tensor]:
    """Positions of the samples in up to `count` parts, as equal as can be for each class and over all.

    A class with fewer samples than folds is in so many of them; one sample is in one.
    """
    order = labels_N.argsort(stable=True)
    return [order[first::count] for first in range(min(count, len(labels_N)))]


def rest(parts: Sequence[Tensor], left_out: int) -> Tensor:
    """The positions in all parts but one."""
    return torch.cat([part for i, part in enumerate(parts) if i != left_out])


def doubt(weights_N: Floats) -> float:
    """The share of one sample more, 1/(n + 1), n = (Σw)²/Σw² the effective number of samples; 0 without any."""
    return 1 / (float(weights_N.sum() ** 2 / (weights_N**2).sum()) + 1) if len(weights_N) else 0.0


def losses(logits_NK: Tensor, labels_N: Tensor, doubt: float = 0.0) -> Floats:
    """-log softmax(z)_y of each sample, in nats.

    Args:
        doubt: the weight of its mean over all labels y beside that of the sample's own. Together, samples of which each
            has the doubt 1/(n + 1) count as n of their labels and one of a random label. Among a few dozen that happen
            to be classified correctly, a fit could otherwise win by confidence alone, at no visible risk.
    """
    found: Floats = torch.nn.functional.cross_entropy(
        logits_NK.double(), labels_N, reduction="none", label_smoothing=doubt
    ).numpy()
    return found


class Difference(NamedTuple):
    """A weighted mean over samples and its standard error."""

    mean: float
    error: float


def difference(ones_N: Floats, others_N: Floats, weights_N: Floats) -> Difference:
    """How much higher the weighted mean of one value is than that of another, of the same samples.

    The standard error is that of a ratio estimate, √(Σ w²·(d - d̄)²)/Σw·√(n/(n-1)); inf of a single sample.
    """
    d_N, total, n = ones_N - others_N, float(weights_N.sum()), len(weights_N)
    mean = float(weights_N @ d_N / total)
    spread = float(np.sqrt((weights_N**2) @ (d_N - mean) ** 2)) / total
    return Difference(mean, spread * math.sqrt(n / (n - 1)) if n > 1 else math.inf)


def simplest(losses_MN: Sequence[Floats], numbers_M: Sequence[int], weights_N: Floats) -> int:
    """Which of M fits to take, by the losses of samples that they have not seen: the one with the fewest numbers whose
    mean loss is within one standard error of the best.
    """
    best = min(losses_MN, key=lambda losses_N: float(weights_N @ losses_N))
    for m in sorted(range(len(numbers_M)), key=numbers_M.__getitem__):
        found = difference(losses_MN[m], best, weights_N)
        if losses_MN[m] is best or found.mean <= found.error:
            return m
    raise AssertionError("the best is within its own error")


def choose_penalty(
    unseen: dict[float, Tensor],
    parts: Sequence[Tensor],
    loss_of: Callable[[Tensor], Floats],
    weights_N: Floats,
) -> tuple[float, Tensor]:
    """The penalty with the best mean loss, and unseen logits under which the choice is not judged by itself: each part
    has those of the penalty that is best on all other parts.

    Args:
        unseen: for each penalty, logits N×K that were calibrated by a fit without their sample.
        loss_of: the losses of N samples with such logits.
    """
    losses_of = {penalty: loss_of(logits_NK) for penalty, logits_NK in unseen.items()}

    def best(samples: Tensor) -> float:
        at = samples.numpy()
        return min(losses_of, key=lambda penalty: float(weights_N[at] @ losses_of[penalty][at]))

    found_NK = torch.empty_like(next(iter(unseen.values())))
    for i, part in enumerate(parts):
        found_NK[part] = unseen[best(rest(parts, i))][part]
    return best(torch.cat(list(parts))), found_NK
