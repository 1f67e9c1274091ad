"""Class activation maps as an exact decomposition of a logit over the positions of the feature map.

B batch, C channels, H W positions, K classes.
"""

from __future__ import annotations

from torch import Tensor


def contributions(features_BCHW: Tensor, weight_BKC: Tensor, bias_BK: Tensor) -> Tensor:
    """The contribution of each position to each of K chosen logits, B×K×H×W; the sum over positions is the logit.

    With the mean ĝ = Σ_u F̂_u/(HW) and z_k = ⟨W_k, ĝ⟩ + b_k: m_k(u) = (⟨W_k, F̂_u⟩ + b_k)/(HW).

    Args:
        features_BCHW: F̂, the pooled map times the head's gain; see `LongTailClassifier.explain`.
        weight_BKC, bias_BK: the classifier's rows of the classes to explain, per image.
    """
    batch, _, height, width = features_BCHW.shape
    maps = (weight_BKC @ features_BCHW.flatten(2) + bias_BK.unsqueeze(2)) / (height * width)
    return maps.reshape(batch, -1, height, width)


def calibrated(maps_BKHW: Tensor, omega_K: Tensor, beta_K: Tensor, weight_norms_K: Tensor) -> Tensor:
    """The same for the margin-calibrated logit: m'_k(u) = ω_k·m_k(u) + β_k·‖W_k‖/(HW), summing to z'_k."""
    height, width = maps_BKHW.shape[-2:]
    offset_K = beta_K * weight_norms_K / (height * width)
    return omega_K[:, None, None] * maps_BKHW + offset_K[:, None, None]
