"""MARC: margin calibration for long-tailed recognition, Wang et al., ACML 2022, arXiv 2112.07225.

C channels, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MARC(nn.Module):
    """z'_k = ω_k·z_k + β_k·‖W_k‖: a scale and a shift of each class's margin d_k = z_k/‖W_k‖.

    Starts as the identity (ω = 1, β = 0). 2K parameters, trained with everything else frozen.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.omega = nn.Parameter(torch.ones(classes))
        self.beta = nn.Parameter(torch.zeros(classes))

    def forward(self, logits_BK: Tensor, weight_norms_K: Tensor) -> Tensor:
        """z', B×K, of logits z and the norms ‖W_k‖."""
        return self.omega * logits_BK + self.beta * weight_norms_K

    def fold(self, weight_KC: Tensor, bias_K: Tensor) -> tuple[Tensor, Tensor]:
        """The calibrated classifier as one linear layer: W'_k = ω_k·W_k, b'_k = ω_k·b_k + β_k·‖W_k‖."""
        folded_K = self.omega * bias_K + self.beta * weight_KC.norm(dim=1)
        return self.omega.unsqueeze(1) * weight_KC, folded_K
