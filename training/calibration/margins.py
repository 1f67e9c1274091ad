"""Fits of a few numbers per class to cached logits of a frozen network: MARC, margins shrunk towards a start, and
learned weight scaling.

N samples, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from camcal.models.marc import MARC
from camcal.training.calibration.temperature import present
from camcal.training.fitting.losses import grw_weights
from camcal.training.fitting.samplers import class_shares
from camcal.training.recipe import CalibrateConfig

MIN_OMEGA = 1e-3
CHUNK = 2**22  # logits at once, in fp64: all of a large data set would take many gigabytes


class Margins(NamedTuple):
    """ω_k·z_k + offset_k, K values each; the offset of MARC is β_k‖W_k‖."""

    omega_K: Tensor
    offset_K: Tensor

    def of(self, logits_NK: Tensor) -> Tensor:
        """The logits N×K with these margins."""
        return self.omega_K * logits_NK + self.offset_K

    @classmethod
    def none(cls, classes: int) -> Margins:
        """Those that change nothing."""
        return cls(torch.ones(classes), torch.zeros(classes))


def fit_marc(
    logits_NK: Tensor,
    labels_N: Tensor,
    weight_norms_K: Tensor,
    counts_K: NDArray[np.int64],
    config: CalibrateConfig,
    seed: int,
    start_K: Tensor | None = None,
    penalty: float = 0.0,
    near: Margins | None = None,
) -> MARC:
    """ω and β of MARC on cached logits, by re-weighted cross-entropy, L = Σ w_y·ℓ/Σ w_y.

    As published (penalty 0): SGD with instance sampling and a cosine rate to zero. Our change: the rate is limited so
    that it converges with few classes and large ‖W_k‖ too, see `_highest_rate`. Our addition, for few images: L plus
    λ/(2K)·Σ_k [(ω_k-1)² + (β_k‖W_k‖-start_k)²]/n_k, so that a class with few images stays near its start. This is
    convex, and L-BFGS finds the minimum on all samples at once.

    ω is kept at or above `MIN_OMEGA`: the published method allows any sign, but a negative ω would invert the class's
    map.

    Args:
        weight_norms_K: ‖W_k‖.
        counts_K: images per class among the samples; each counts once, however often it was augmented.
        start_K: where the offsets β_k‖W_k‖ start; zeros by default.
        penalty: λ.
        near: a solution for another penalty, as a start for the search; it affects the time only.
    """
    start_K = torch.zeros_like(weight_norms_K) if start_K is None else start_K
    weights_K = grw_weights(counts_K, config.exponent)
    if penalty:
        pull_K = penalty / (2 * len(counts_K) * torch.from_numpy(np.maximum(counts_K, 1)).double())
        found = _penalised(logits_NK, labels_N, weights_K, start_K, pull_K, near)
        return _as_marc(found, weight_norms_K)
    marc = MARC(logits_NK.shape[1])
    with torch.no_grad():
        marc.beta.copy_(start_K / weight_norms_K)
    generator = torch.Generator().manual_seed(seed)

    def step_loss() -> Tensor:
        index = torch.randint(len(labels_N), (config.batch_size,), generator=generator)
        return functional.cross_entropy(marc(logits_NK[index], weight_norms_K), labels_N[index], weight=weights_K)

    limit = _highest_rate(logits_NK, labels_N, weight_norms_K, weights_K)
    _descend([marc.omega, marc.beta], marc.omega, step_loss, config, min(config.lr, limit))
    return marc


def _as_marc(margins: Margins, weight_norms_K: Tensor) -> MARC:
    marc = MARC(len(weight_norms_K))
    with torch.no_grad():
        marc.omega.copy_(margins.omega_K)
        marc.beta.copy_(margins.offset_K / weight_norms_K)
    return marc


def fit_shrunk(logits_NK: Tensor, labels_N: Tensor, penalty: float, near: Margins | None = None) -> Margins:
    """ω and offsets by the class-balanced likelihood of logits that are about right already, so near 1 and 0.

    Least is the mean over the classes of -log p plus λ/(2K)·Σ_k [(ω_k-1)² + offset_k²]/n_k: the posterior mode under
    independent normal priors with standard deviation 1/√λ, each class's n_k images being the only evidence for it. A
    class without images keeps 1 and 0, and takes no part.

    Args:
        penalty: λ > 0.
        near: a solution for another penalty, as a start for the search; it affects the time only.
    """
    counts_K = labels_N.bincount(minlength=logits_NK.shape[1])
    present_K, among_N = present(labels_N, len(counts_K))
    found = Margins.none(len(counts_K))
    counts_k = counts_K[present_K].double()
    if len(counts_k) < 2:
        return found
    pull_k = penalty / (2 * len(counts_k) * counts_k)
    start_k = torch.zeros(len(counts_k))
    begin = None if near is None else Margins(near.omega_K[present_K], near.offset_K[present_K])
    fitted = _penalised(logits_NK[:, present_K], among_N, 1 / counts_k, start_k, pull_k, begin)
    found.omega_K[present_K], found.offset_K[present_K] = fitted.omega_K.float(), fitted.offset_K.float()
    return found


def _highest_rate(logits_NK: Tensor, labels_N: Tensor, weight_norms_K: Tensor, weights_K: Tensor) -> float:
    """1/h, with h the highest curvature of MARC's loss if each class is as probable as its share of the weights.

    Along ω_k and β_k the second derivative is the weighted mean of p_k(1 - p_k)·x², x = z_k and ‖W_k‖. With many
    classes 1/h exceeds the published rate; with few, and a scalar of 20 in ‖W_k‖, that rate would not converge.
    """
    w_N = weights_K[labels_N]
    share_K = torch.zeros_like(weights_K).index_add_(0, labels_N, w_N) / w_N.sum()
    square_K = torch.maximum(weight_norms_K.square(), w_N @ logits_NK.square() / w_N.sum())
    return 1 / max(float((share_K * (1 - share_K) * square_K).max()), 1e-12)


def fit_lws(
    logits_NK: Tensor, labels_N: Tensor, counts_K: NDArray[np.int64], config: CalibrateConfig, seed: int
) -> Tensor:
    """Learned weight scaling (Kang et al., arXiv 1910.09217): z_k = ρ_k·z°_k by class-balanced sampling, K values.

    Fitted on cached logits by plain cross-entropy and SGD; ρ is kept at or above `MIN_OMEGA`, as ω is.
    """
    scale_K = nn.Parameter(torch.ones(logits_NK.shape[1]))
    generator = torch.Generator().manual_seed(seed)
    chances_N = torch.from_numpy(class_shares("class_balanced", counts_K, 0) / np.maximum(counts_K, 1))[labels_N]

    def step_loss() -> Tensor:
        index = chances_N.multinomial(config.batch_size, replacement=True, generator=generator)
        return functional.cross_entropy(scale_K * logits_NK[index], labels_N[index])

    _descend([scale_K], scale_K, step_loss, config, config.lr)
    return scale_K.detach()


def _descend(
    parameters: list[nn.Parameter],
    positive: nn.Parameter,
    step_loss: Callable[[], Tensor],
    config: CalibrateConfig,
    rate: float,
) -> None:
    """SGD with a warm-up from half the rate and then a cosine to zero; `positive` is kept at or above `MIN_OMEGA`."""
    optimizer = torch.optim.SGD(parameters, rate, config.momentum, weight_decay=config.weight_decay)
    warmup = min(config.warmup, config.iterations // 2)
    for iteration in range(config.iterations):
        rising = 0.5 + 0.5 * iteration / max(warmup, 1)
        falling = 0.5 + 0.5 * math.cos(math.pi * (iteration - warmup) / (config.iterations - warmup))
        optimizer.param_groups[0]["lr"] = rate * (rising if iteration < warmup else falling)
        optimizer.zero_grad(set_to_none=True)
        step_loss().backward()
        optimizer.step()
        with torch.no_grad():
            positive.clamp_(min=MIN_OMEGA)


def _penalised(
    logits_NK: Tensor,
    labels_N: Tensor,
    weights_K: Tensor,
    start_K: Tensor,
    pull_K: Tensor,
    near: Margins | None,
) -> Margins:
    """The minimum of the weighted mean loss plus Σ_k pull_k·[(ω_k-1)² + (offset_k-start_k)²], in fp64."""
    weights_K, start_K = weights_K.double(), start_K.double()
    parts = list(zip(*(rows.split(max(1, CHUNK // len(start_K))) for rows in (logits_NK, labels_N)), strict=True))
    total = weights_K[labels_N].sum()
    # ω = MIN_OMEGA + log(1 + exp v) is never below its bound. Near it the slope vanishes, so the search starts above.
    first_K = torch.ones_like(start_K) if near is None else near.omega_K.double().clamp(min=0.1)
    raw_K = nn.Parameter((first_K - MIN_OMEGA).expm1().log())
    offset_K = nn.Parameter(start_K.clone() if near is None else near.offset_K.double())
    optimizer = torch.optim.LBFGS([raw_K, offset_K], max_iter=1000, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = pull_K @ ((MIN_OMEGA + functional.softplus(raw_K) - 1).square() + (offset_K - start_K).square())
        loss.backward()
        found = float(loss.detach())
        for z_NK, y_N in parts:
            scores_NK = (MIN_OMEGA + functional.softplus(raw_K)) * z_NK.double() + offset_K
            loss = functional.cross_entropy(scores_NK, y_N, weight=weights_K, reduction="sum") / total
            loss.backward()
            found += float(loss.detach())
        return found

    optimizer.step(closure)
    return Margins((MIN_OMEGA + functional.softplus(raw_K)).detach(), offset_K.detach())
