"""Class activation maps as an exact decomposition of a logit over the positions of the feature map.

B batch, C channels, H W positions, K classes.
"""

from __future__ import annotations

from torch import Tensor


def contributions(features_BCHW: Tensor, gain_B1: Tensor, weight_BKC: Tensor, bias_BK: Tensor) -> Tensor:
    """What each position contributes to each of K chosen logits, B×K×H×W; the sum over positions is the logit.

    With global average pooling g = Σ_u F_u/(HW) and z_k = ν·⟨W_k, g⟩ + b_k:
    m_k(u) = (ν·⟨W_k, F_u⟩ + b_k)/(HW).

    Args:
        features_BCHW: the map that is pooled.
        gain_B1: ν, which depends on the pooled feature's norm.
        weight_BKC, bias_BK: the rows of the classifier for the classes to be explained, per image.
    """
    batch, _, height, width = features_BCHW.shape
    scores = weight_BKC @ features_BCHW.flatten(2)
    maps = (gain_B1.unsqueeze(2) * scores + bias_BK.unsqueeze(2)) / (height * width)
    return maps.reshape(batch, -1, height, width)


def calibrated(maps_BKHW: Tensor, omega_K: Tensor, beta_K: Tensor, weight_norms_K: Tensor) -> Tensor:
    """The same for the margin-calibrated logit: m'_k(u) = ω_k·m_k(u) + β_k·‖W_k‖/(HW), summing to z'_k."""
    height, width = maps_BKHW.shape[-2:]
    offset_K = beta_K * weight_norms_K / (height * width)
    return omega_K[:, None, None] * maps_BKHW + offset_K[:, None, None]
