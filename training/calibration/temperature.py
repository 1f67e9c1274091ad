"""Scale, temperature and lean: few numbers, fitted by the likelihood of held-out logits. N samples, K classes.

Classes without a sample are left out of the softmax: their probabilities would only ever be too high, which says
nothing about them. What is left is the likelihood of the labels given that they are among the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from camcal.training.priors import Floats, even_prior, prior_weights


def fit_scale(
    logits_NK: Tensor, labels_N: Tensor, weights_N: Tensor, spread: float = math.inf, offset_K: Tensor | None = None
) -> float:
    """The factor a > 0 for which softmax(a·z + offset) has the least weighted negative log-likelihood.

    With a finite spread σ it is the posterior mode under a normal prior of log a, with mean 0 and standard deviation σ:
    L(a) + (log a)²/(2σ²·n) is least, where L is the weighted mean and n = (Σw)²/Σw² the effective number of samples.
    A few hundred samples overrule the prior; with a few dozen, whose best factor is mostly chance, it keeps a near 1.

    A golden-section search over log a in [-4, 4] finds it to 1e-6. Without samples it is 1.
    """
    if not len(labels_N):
        return 1.0
    present_K, labels_N = present(labels_N, logits_NK.shape[1])
    logits_NK, weights_N = logits_NK[:, present_K].double(), weights_N.double()
    offset_K = logits_NK.new_zeros(()) if offset_K is None else offset_K[present_K]
    pull = _pull(weights_N, spread)

    def loss(t: float) -> float:
        return mean_nll(math.exp(t) * logits_NK + offset_K, labels_N, weights_N) + pull * t**2

    return math.exp(_golden_section(loss, -4.0, 4.0))


def fit_temperature(
    logits_NK: Tensor, labels_N: Tensor, prior_K: Floats, spread: float, raw_prior_K: Floats | float = 1.0
) -> float:
    """The temperature T of probabilities for the prior π, softmax(z/T + log π/q), by likelihood under that prior.

    Args:
        prior_K: π.
        raw_prior_K: q, the prior that softmax(z) is for; by default balanced.
    """
    weights_N = torch.from_numpy(prior_weights(labels_N.numpy(), prior_K))
    return 1 / fit_scale(logits_NK, labels_N, weights_N, spread, torch.from_numpy(np.log(prior_K / raw_prior_K)))


def fit_lean(
    logits_NK: Tensor, labels_N: Tensor, prior_K: Floats, spread: float, raw_prior_K: Floats | None = None
) -> tuple[float, float]:
    """The lean δ and the temperature T of balanced probabilities softmax(z/T - log q - δ·log π), by their likelihood.

    Temperature scaling with a bias, after Alexandari et al. (arXiv 1901.06852), in one direction only: δ is how far
    balanced logits still favour the common classes (or, below zero, the rare ones). As in `fit_scale`, the mode under
    independent normal priors of δ and log 1/T, both with mean 0 and standard deviation σ = `spread`.

    Args:
        prior_K: π, the training frequencies. If they are uniform, δ is 0.
        raw_prior_K: q, the prior that softmax(z) is for; by default balanced.
    """
    if not len(labels_N):
        return 0.0, 1.0
    weights_N = torch.from_numpy(prior_weights(labels_N.numpy(), even_prior(len(prior_K))))
    pull = _pull(weights_N, spread)
    present_K, labels_N = present(labels_N, logits_NK.shape[1])
    logits_NK, log_prior_K = logits_NK[:, present_K].double(), torch.from_numpy(np.log(prior_K))[present_K]
    offset_K = 0.0 if raw_prior_K is None else -torch.from_numpy(np.log(raw_prior_K))[present_K]
    log_factor, lean = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.LBFGS([log_factor, lean], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = _mean_loss(log_factor.exp() * logits_NK + offset_K - lean * log_prior_K, labels_N, weights_N)
        loss = loss + pull * (log_factor.square() + lean.square())
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return lean.item(), math.exp(-log_factor.item())


def present(labels_N: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Which of K classes have a sample, a boolean each; and the labels counted among those."""
    present_K = torch.zeros(classes, dtype=torch.bool)
    present_K[labels_N] = True
    return present_K, (present_K.cumsum(0) - 1)[labels_N]


def lean_offset(lean: float, temperature: float, prior_K: Floats) -> Tensor:
    """The correction of a lean, added to logits before division by the temperature: -δ·T·log(K·π), K values in fp32."""
    return torch.from_numpy(-lean * temperature * np.log(prior_K * len(prior_K))).float()


def mean_nll(logits_NK: Tensor, labels_N: Tensor, weights_N: Tensor) -> float:
    """The weighted mean of -log softmax(z)_y, in nats."""
    return float(_mean_loss(logits_NK, labels_N, weights_N))


def _pull(weights_N: Tensor, spread: float) -> float:
    """1/(2σ²·n): the weight of the normal prior beside the mean over n = (Σw)²/Σw² effective samples."""
    return 1 / (2 * spread**2 * float(weights_N.sum() ** 2 / weights_N.square().sum()))


def _mean_loss(logits_NK: Tensor, labels_N: Tensor, weights_N: Tensor) -> Tensor:
    losses_N = functional.cross_entropy(logits_NK.double(), labels_N, reduction="none")
    return weights_N.double() @ losses_N / weights_N.double().sum()


def _golden_section(function: Callable[[float], float], low: float, high: float, tolerance: float = 1e-6) -> float:
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > tolerance:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    return (low + high) / 2
