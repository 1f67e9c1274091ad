"""ResLT: residual branches for the rare classes, Cui et al., TPAMI 2022, arXiv 2101.10633.

Three branches see the same feature map F: the first learns from all classes, the second from the medium and rare ones,
the third from the rare ones alone. They share one classifier, and the prediction is the sum of their logits. The losses
that distinguish the branches are in `camcal.training.fitting.losses`.

B batch, R = 3 branches, C channels, H W positions, K classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

BRANCHES = 3

Form = Literal["cifar", "large", "large-official"]


class NormBranches(nn.Module):
    """The form for CIFAR: each branch has its own batch normalisation, F_b = BN_b(F); 6C parameters.

    Args:
        width: channels C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(BRANCHES))

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """The branches' maps, B×R×C×H×W."""
        return torch.stack([norm(features_BCHW) for norm in self.norms], dim=1)

    def affine(self) -> tuple[Tensor, Tensor]:
        """The branches in evaluation mode as F_b = a_b⊙F + c_b: (a, c), R×C each.

        a_b = γ_b/√(var_b+ε) and c_b = bias_b - a_b·mean_b.
        """
        scales, shifts = [], []
        for norm in self.norms:
            assert isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None and norm.running_mean is not None
            scale_C = norm.weight / (norm.running_var + norm.eps).sqrt()
            scales.append(scale_C)
            shifts.append(norm.bias - scale_C * norm.running_mean)
        return torch.stack(scales), torch.stack(shifts)


class ConvBranches(nn.Module):
    """The form for large networks: a 1×1 convolution to 3C channels, batch normalisation and ReLU, split in three.

    Because of the ReLU it cannot be folded, but everything after it is linear, so maps are exact.

    The authors' code pools after this in training, and before it in evaluation. `pool_first` does the latter: a channel
    whose mean before the ReLU is negative becomes zero everywhere, and others skip the ReLU, so that the mean of a map
    is the ReLU of the mean, and maps stay exact.

    Args:
        width: channels C.
        pool_first: pool before the ReLU in evaluation mode.
    """

    def __init__(self, width: int, pool_first: bool = False) -> None:
        super().__init__()
        self.pool_first = pool_first
        self.convolution = nn.Conv2d(width, BRANCHES * width, 1, bias=False)
        self.norm = nn.BatchNorm2d(BRANCHES * width)
        nn.init.kaiming_normal_(self.convolution.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """The branches' maps, B×R×C×H×W."""
        maps: Tensor = self.norm(self.convolution(features_BCHW))
        if self.pool_first and not self.training:
            maps = maps * (maps.mean(dim=(2, 3), keepdim=True) > 0)
        else:
            maps = torch.relu(maps)
        maps_BRCHW: Tensor = maps.unflatten(1, (BRANCHES, -1))
        return maps_BRCHW


def build_branches(form: Form, width: int) -> NormBranches | ConvBranches:
    """The branches of one form for a map of `width` channels."""
    return NormBranches(width) if form == "cifar" else ConvBranches(width, pool_first=form == "large-official")


def fold(branches: NormBranches, weight_KC: Tensor, bias_K: Tensor) -> tuple[Tensor, Tensor]:
    """Branches in evaluation mode and their shared linear layer as one layer on the mean of F, K×C and K.

    Σ_b (W·(a_b⊙g + c_b) + bias) = W·diag(Σ_b a_b)·g + W·Σ_b c_b + R·bias.
    """
    scale_RC, shift_RC = branches.affine()
    return weight_KC * scale_RC.sum(dim=0), weight_KC @ shift_RC.sum(dim=0) + BRANCHES * bias_K
