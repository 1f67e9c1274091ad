"""Classifier heads, and the rescaling of their logits after training.

Given the gain from the pooled feature's norm, each head is linear in the feature, which makes maps exact. Rescaling
after training (a scalar, τ-norm, learned weight scaling) is affine in each logit, so maps stay exact.

B batch, R branches, C channels, K classes; `…` stands for any leading dimensions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional


class Head(nn.Module, ABC):
    """A classifier, z = W·(gain(g)⊙g) + b.

    W (K×C) is `effective_weight`, b (K) `effective_bias`, and `gain` gives …×1 or …×C.

    Attributes:
        weight: K×C, before the head's own normalisation.
        bias: K.
        scalar: s, which multiplies all logits.
    """

    bias: Tensor
    scalar: Tensor

    has_gain = False
    """Whether `gain` depends on the feature; without, the head is one linear layer."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, width))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    @abstractmethod
    def effective_weight(self) -> Tensor:
        """W, K×C, with the scalar s multiplied in."""

    def effective_bias(self) -> Tensor:
        """The bias, K."""
        return self.scalar * self.bias

    def gain(self, pooled_BC: Tensor) -> Tensor:
        """The factor from the norm of the pooled feature, …×1 or, per channel, …×C."""
        return torch.ones_like(pooled_BC[..., :1])

    def weight_norms(self) -> Tensor:
        """‖W_k‖ for margin calibration: the slope of z_k along its weight vector, K values."""
        norms: Tensor = self.effective_weight().norm(dim=1)
        return norms

    def forward(self, pooled_BC: Tensor) -> Tensor:
        """Logits, …×K, of pooled features, …×C."""
        return functional.linear(self.gain(pooled_BC) * pooled_BC, self.effective_weight(), self.effective_bias())


class LinearHead(Head):
    """The plain classifier: z = W·g + b. Its scalar stays 1 unless it is folded from another head."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, classes)
        self.bias = nn.Parameter(torch.zeros(classes))
        self.register_buffer("scalar", torch.ones(()))

    def effective_weight(self) -> Tensor:
        return self.scalar * self.weight


class WeightNormHead(Head):
    """Normalised weights, plain features: z_k = s·⟨g, W_k/‖W_k‖⟩. No class wins by a longer weight vector.

    Args:
        scalar: the initial s.
        learn_scalar: train s together with the weights.

    Raises:
        ValueError: if the scalar is not positive.
    """

    eps = 1e-6

    def __init__(self, width: int, classes: int, scalar: float = 1.0, learn_scalar: bool = True) -> None:
        super().__init__(width, classes)
        if scalar <= 0:
            raise ValueError(f"scalar must be positive, got {scalar}")
        if learn_scalar:
            self.scalar = nn.Parameter(torch.tensor(float(scalar)))
        else:
            self.register_buffer("scalar", torch.tensor(float(scalar)))
        self.register_buffer("bias", torch.zeros(classes), persistent=False)

    def effective_weight(self) -> Tensor:
        return self.scalar * functional.normalize(self.weight, dim=1, eps=self.eps)


class CosineHead(WeightNormHead):
    """The normalised classifier: z_k = s·⟨g/‖g‖, W_k/‖W_k‖⟩ (arXiv 2108.12757; LDAM's form, arXiv 1906.07413).

    Without s the logits lie in [-1, 1], where cross-entropy cannot approach zero.
    """

    has_gain = True

    def __init__(self, width: int, classes: int, scalar: float = 16.0, learn_scalar: bool = True) -> None:
        super().__init__(width, classes, scalar, learn_scalar)

    def gain(self, pooled_BC: Tensor) -> Tensor:
        norm_B1: Tensor = pooled_BC.norm(dim=-1, keepdim=True)
        return 1 / norm_B1.clamp_min(self.eps)


class CosNormHead(CosineHead):
    """CosNorm with the squashing of OLTR: z_k = s·⟨‖g‖/(1+‖g‖)·g/‖g‖, W_k/‖W_k‖⟩ (arXiv 1904.05160; s = 16).

    Short features, which carry little evidence, keep small logits.
    """

    def gain(self, pooled_BC: Tensor) -> Tensor:
        norm_B1: Tensor = pooled_BC.norm(dim=-1, keepdim=True)
        return 1 / (1 + norm_B1)


class CausalNormHead(CosineHead):
    """Multi-head causal norm: z_k = s/H·Σ_h ⟨g_h/‖g_h‖, W_kh/(‖W_kh‖+γ)⟩ (arXiv 2009.12991; s = 16, H = 2).

    Features and weights are split into H parts, each normalised separately. The paper's subtraction of the effect of
    the moving-average feature at test time is not implemented.

    Raises:
        ValueError: if the channels cannot be divided into the heads.
    """

    heads = 2
    gamma = 1 / 32

    def __init__(self, width: int, classes: int, scalar: float = 16.0, learn_scalar: bool = True) -> None:
        super().__init__(width, classes, scalar, learn_scalar)
        if width % self.heads:
            raise ValueError(f"{width} channels cannot be divided into {self.heads} heads")

    def effective_weight(self) -> Tensor:
        parts_KHD = self.weight.unflatten(1, (self.heads, -1))
        unit_KHD = parts_KHD / (parts_KHD.norm(dim=2, keepdim=True) + self.gamma)
        weight_KC: Tensor = self.scalar / self.heads * unit_KHD.flatten(1)
        return weight_KC

    def gain(self, pooled_BC: Tensor) -> Tensor:
        parts = pooled_BC.unflatten(-1, (self.heads, -1))
        norms: Tensor = parts.norm(dim=-1, keepdim=True).clamp_min(self.eps)
        return (1 / norms).expand_as(parts).flatten(-2)


_NORMALIZED: dict[str, type[WeightNormHead]] = {
    "weight": WeightNormHead,
    "cosine": CosineHead,
    "cosnorm": CosNormHead,
    "causal": CausalNormHead,
}
HEADS = ("linear", *_NORMALIZED)


def build_head(name: str, width: int, classes: int, scalar: float, learn_scalar: bool) -> Head:
    """The head called `name`, one of `HEADS`; `linear` has no scalar.

    Raises:
        ValueError: if the name is unknown, or the head refuses its arguments.
    """
    if name == "linear":
        return LinearHead(width, classes)
    if name not in _NORMALIZED:
        raise ValueError(f"unknown head {name!r}; known: {', '.join(HEADS)}")
    return _NORMALIZED[name](width, classes, scalar, learn_scalar)


class Rescale(nn.Module):
    """Rescaling after training and before margins: z_k = f·ρ_k·z°_k + δ_k of the trained logits z°.

    f is the selected scalar over the trained one; ρ and δ come from τ-norm or learned weight scaling. They are separate
    from the head, so that whatever else depends on the head (CAMC) stays as trained.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.factor: Tensor
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("factor", torch.ones(()))
        self.register_buffer("scale", torch.ones(classes))
        self.register_buffer("shift", torch.zeros(classes))

    def slopes(self) -> Tensor:
        """f·ρ_k, K values."""
        return self.factor * self.scale

    def forward(self, trained_BK: Tensor) -> Tensor:
        """z, B×K, of the trained logits z°."""
        return self.slopes() * trained_BK + self.shift

    def undo(self, logits_BK: Tensor) -> Tensor:
        """The trained logits z° of logits z."""
        return (logits_BK - self.shift.to(logits_BK)) / self.slopes().to(logits_BK)


def tau_norm(weight_KC: Tensor, bias_K: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """τ-normalisation (Kang et al., arXiv 1910.09217) as (ρ, δ) of `Rescale`: W_k/‖W_k‖^τ, without the bias."""
    scale_K = weight_KC.norm(dim=1) ** -tau
    return scale_K, -scale_K * bias_K
