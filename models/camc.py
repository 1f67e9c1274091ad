"""Class activation map calibration: reinforce the positions that agree with the evidence for the expected class.

After the abstract of Zhang et al., arXiv 2108.12757: the module "highlights the correlated image regions across data
and reinforces the representations in these areas". Its equations are not public to us; the design below is ours.

B batch, C channels, H W positions, K classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Evidence = Literal["weights", "prototypes"]


class CAMC(nn.Module):
    """F' = (1 + A)·F with an attention map A in (0, 1) from the correlation of each position with class evidence.

    For an image with expected class distribution p (the softmax of the logits of the plain map F):

    - e = Σ_k p_k·E_k, the expected evidence; E_k is a unit vector, the classifier's weights of class k, or its
      prototype: a moving average over the training data of the features in that class's important regions.
    - r_u = ⟨F_u/‖F_u‖, e/‖e‖⟩, its correlation with each position u, standardised over the positions of the image.
    - A_u = sigmoid(α·r_u), with a learned sharpness α.

    No label is used outside `update`, so training and serving take the same path.

    Args:
        width: channels C of the feature map.
        classes: number of classes K.
        evidence: where E comes from.
        momentum: of the prototypes' moving average, per batch that holds the class.

    Raises:
        ValueError: if the momentum is not in [0, 1).
    """

    def __init__(self, width: int, classes: int, evidence: Evidence = "prototypes", momentum: float = 0.9) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        self.evidence = evidence
        self.momentum = momentum
        self.alpha = nn.Parameter(torch.ones(()))
        self.register_buffer("prototypes", torch.zeros(classes, width))
        self.prototypes: Tensor

    def attention(self, features_BCHW: Tensor, expected_BK: Tensor, weight_KC: Tensor) -> Tensor:
        """A, B×H×W in (0, 1), for features and the expected class distribution."""
        source_KC = self.prototypes if self.evidence == "prototypes" else weight_KC
        evidence_BC = functional.normalize(expected_BK @ functional.normalize(source_KC, dim=1), dim=1)
        unit_BCHW = functional.normalize(features_BCHW, dim=1, eps=1e-6)
        correlation_BU = (evidence_BC.unsqueeze(1) @ unit_BCHW.flatten(2)).squeeze(1)
        centred_BU = correlation_BU - correlation_BU.mean(dim=1, keepdim=True)
        # Added under the root: a class without a prototype yet has no spread, where the root's slope is infinite.
        spread_B1 = (centred_BU.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()
        attention_BU = torch.sigmoid(self.alpha * centred_BU / spread_B1)
        return attention_BU.reshape(features_BCHW.shape[0], *features_BCHW.shape[2:])

    @torch.no_grad()
    def update(self, features_BCHW: Tensor, attention_BHW: Tensor, labels_B: Tensor) -> None:
        """Move the prototypes of the labelled classes towards the attended features of this batch."""
        weights_BHW = attention_BHW / attention_BHW.sum(dim=(1, 2), keepdim=True)
        attended_BC = functional.normalize((features_BCHW * weights_BHW.unsqueeze(1)).sum(dim=(2, 3)), dim=1)
        sums_KC = torch.zeros_like(self.prototypes).index_add_(0, labels_B, attended_BC.to(self.prototypes.dtype))
        present_K = torch.zeros(len(sums_KC), device=sums_KC.device).index_fill_(0, labels_B, 1.0).bool()
        fresh_K = self.prototypes.abs().sum(dim=1) == 0
        keep_K1 = torch.where(fresh_K, 0.0, self.momentum).unsqueeze(1)
        moved_KC = keep_K1 * self.prototypes + (1 - keep_K1) * functional.normalize(sums_KC, dim=1)
        self.prototypes.copy_(torch.where(present_K.unsqueeze(1), moved_KC, self.prototypes))
