"""Losses for long-tailed classes, composed of three parts: change of the logits, loss of a sample, class weights.

B batch, R branches, K classes; n_k the training images of class k, N their sum.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camcal.models.reslt import BRANCHES
from camcal.training.metrics import ranks
from camcal.training.recipe import LossConfig


def grw_weights(counts_K: NDArray[np.int64], exponent: float) -> Tensor:
    """Generalised re-weighting: w_k ∝ (n_k/N)^-exponent, rescaled to sum to K (arXiv 2103.16370; MARC, 2112.07225).

    A class without samples counts as a class with one.
    """
    counts_K = np.maximum(counts_K, 1)
    return _sum_to_classes((counts_K / counts_K.sum()) ** -exponent)


def effective_weights(counts_K: NDArray[np.int64], beta: float) -> Tensor:
    """Class-balanced weights by effective number: w_k ∝ (1-β)/(1-β^n_k), rescaled to sum to K (arXiv 1901.05555)."""
    return _sum_to_classes((1 - beta) / (1 - beta ** counts_K.astype(np.float64)))


def _sum_to_classes(weights_K: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(weights_K * len(weights_K) / weights_K.sum()).float()


def class_weights(config: LossConfig, counts_K: NDArray[np.int64]) -> Tensor:
    """The class weights once they apply, K values."""
    if config.weights == "grw":
        return grw_weights(counts_K, config.exponent)
    if config.weights == "class_balanced":
        return effective_weights(counts_K, config.effective_beta)
    return torch.ones(len(counts_K))


def ldam_margins(counts_K: NDArray[np.int64], largest: float) -> Tensor:
    """Δ_k ∝ n_k^(-1/4), the largest of them `largest` (Cao et al., arXiv 1906.07413), K values."""
    margins_K = counts_K.astype(np.float64) ** -0.25
    return torch.from_numpy(margins_K * largest / margins_K.max()).float()


def log_prior(config: LossConfig, counts_K: NDArray[np.int64]) -> Tensor:
    """The offset added to logits in training: τ·log(n_k/N), K values; zeros for losses without one.

    Logit adjustment (Menon et al., arXiv 2007.07314); with τ = 1 it is balanced softmax (Ren et al., arXiv 2007.10740).
    """
    tau = {"balanced_softmax": 1.0, "logit_adjustment": config.tau}.get(config.name, 0.0)
    return torch.from_numpy(tau * np.log(counts_K / counts_K.sum())).float()


def smoothing(config: LossConfig, counts_K: NDArray[np.int64]) -> Tensor:
    """Label smoothing of each class, ε_k, K values.

    Label-aware smoothing (MiSLAS, arXiv 2104.00466, the concave form): from the ε of the rarest class to that of the
    most frequent as sin(π/2·(n_k - n_min)/(n_max - n_min)).
    """
    if config.smoothing_tail is None:
        return torch.full((len(counts_K),), config.smoothing)
    span = max(int(counts_K.max() - counts_K.min()), 1)
    rise_K = np.sin(math.pi / 2 * (counts_K - counts_K.min()) / span)
    return torch.from_numpy(config.smoothing_tail + (config.smoothing - config.smoothing_tail) * rise_K).float()


def branch_members(config: LossConfig, counts_K: NDArray[np.int64]) -> Tensor:
    """Which classes each of ResLT's branches learns from, R×K of 0 and 1: all; medium and rare; rare.

    Raises:
        ValueError: if a rank is beyond the number of classes.
    """
    classes = len(counts_K)
    bounds = config.branch_ranks or (classes * 35 // 100, classes * 70 // 100)
    if bounds[1] > classes:
        raise ValueError(f"loss.branch_ranks goes to {bounds[1]}; there are {classes} classes")
    ranks_K = ranks(counts_K)
    return torch.from_numpy(np.stack([ranks_K >= bound for bound in (0, *bounds)])).float()


class Criterion:
    """The loss of a batch, by a `LossConfig`.

    Of each sample with label y, from its logits z:

    - z' = z + τ·log π, or z'_y = z_y - s·Δ_y for LDAM (s the head's scalar, which is in z already);
    - ℓ = -(1-ε_y)·log p_y - ε_y/K·Σ_k log p_k, with p = softmax(z');
    - for focal loss (arXiv 1708.02002, on the softmax) ℓ·(1-p_y)^γ;
    - the mean over samples weighted by w_y: Σ w_y·ℓ/Σ w_y.

    Args:
        counts_K: of the images trained on.
        scalar: of the head; LDAM's margins are multiplied by it.
        device: of the logits.
    """

    def __init__(
        self, config: LossConfig, counts_K: NDArray[np.int64], scalar: Tensor, device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        self.scalar = scalar
        self.weights_K = class_weights(config, counts_K).to(device)
        self.log_prior_K = log_prior(config, counts_K).to(device)
        self.margins_K = ldam_margins(counts_K, config.margin).to(device)
        self.smoothing_K = smoothing(config, counts_K).to(device)
        self.counts_K = counts_K

    @cached_property
    def members_RK(self) -> Tensor:
        """Of ResLT's branches; see `branch_members`."""
        return branch_members(self.config, self.counts_K).to(self.weights_K.device)

    def __call__(
        self, logits: Tensor, labels_B: Tensor, progress: float = 1.0, whole_labels: Tensor | None = None
    ) -> Tensor:
        """The loss of logits B×K, or of ResLT's branches B×R×K, in fp32.

        Args:
            progress: the epochs done over all epochs.
            whole_labels: of the whole batch of which these samples are a part; the losses of all parts then sum to the
                loss of the whole.
        """
        weights_K = self.weights_K if progress >= self.config.reweight_from else torch.ones_like(self.weights_K)
        whole_labels = labels_B if whole_labels is None else whole_labels
        weight_B, whole_B = weights_K[labels_B], weights_K[whole_labels]
        if logits.ndim == 2:
            return (weight_B * self._losses(logits, labels_B)).sum() / whole_B.sum()
        # ResLT: β·L_ice + (1-β)·L(H+M+T); L_ice is the mean over all pairs of a branch and a sample it learns from.
        branch_weight_BR = weight_B.unsqueeze(1) * self.members_RK[:, labels_B].T
        branch_loss_BR = torch.stack([self._losses(logits[:, r], labels_B) for r in range(BRANCHES)], dim=1)
        apart = (branch_weight_BR * branch_loss_BR).sum() / (
            whole_B * self.members_RK[:, whole_labels].sum(dim=0)
        ).sum()
        together = (weight_B * self._losses(logits.sum(dim=1), labels_B)).sum() / whole_B.sum()
        return self.config.branch_beta * apart + (1 - self.config.branch_beta) * together

    def _losses(self, logits_BK: Tensor, labels_B: Tensor) -> Tensor:
        index_B1 = labels_B.unsqueeze(1)
        logits_BK = logits_BK.float() + self.log_prior_K
        if self.config.name == "ldam":
            margin_B1 = self.scalar * self.margins_K[index_B1]
            logits_BK = logits_BK.scatter_add(1, index_B1, -margin_B1)
        log_p_BK = logits_BK.log_softmax(dim=1)
        own_B = log_p_BK.gather(1, index_B1).squeeze(1)
        spread_B = self.smoothing_K[labels_B]
        losses_B = -(1 - spread_B) * own_B - spread_B * log_p_BK.mean(dim=1)
        if self.config.name == "focal":
            # At zero, a power below one has an infinite slope.
            losses_B = losses_B * (-torch.expm1(own_B)).clamp_min(1e-6) ** self.config.gamma
        return losses_B
