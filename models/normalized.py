"""Classifier heads. Given the norm of the pooled feature, each of them is linear in it, which makes maps exact.

B batch, C channels, K classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class LinearHead(nn.Module):
    """The plain classifier: z = W·g + b.

    Every head computes `z = gain(g)·(W g) + bias` with its own `effective_weight` W (K×C), `gain` (B×1) and `bias` (K).
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, width))
        self.bias = nn.Parameter(torch.zeros(classes))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.scalar: Tensor
        self.register_buffer("scalar", torch.ones(()))

    def effective_weight(self) -> Tensor:
        """W, K×C, with the scalar s multiplied in."""
        return self.scalar * self.weight

    def effective_bias(self) -> Tensor:
        """The bias, K."""
        return self.scalar * self.bias

    def gain(self, pooled_BC: Tensor) -> Tensor:
        """What the pooled feature's own norm contributes, B×1."""
        return torch.ones_like(pooled_BC[:, :1])

    def weight_norms(self) -> Tensor:
        """‖W_k‖ as margin calibration needs it: the slope of z_k along its weight vector, K values."""
        norms: Tensor = self.effective_weight().norm(dim=1)
        return norms

    def forward(self, pooled_BC: Tensor) -> Tensor:
        return self.gain(pooled_BC) * functional.linear(pooled_BC, self.effective_weight()) + self.effective_bias()


class CosineHead(LinearHead):
    """The normalised classifier: z_k = s·⟨g/‖g‖, W_k/‖W_k‖⟩ (arXiv 2108.12757; LDAM's form, arXiv 1906.07413).

    Without s the logits lie in [-1, 1], where cross-entropy cannot come near zero; with it, every class has the same
    weight norm, so that a common class cannot win by a longer vector.

    Args:
        scalar: the initial s.
        learn_scalar: train s together with the weights.

    Raises:
        ValueError: if the scalar is not positive.
    """

    eps = 1e-6

    def __init__(self, width: int, classes: int, scalar: float = 16.0, learn_scalar: bool = True) -> None:
        super().__init__(width, classes)
        if scalar <= 0:
            raise ValueError(f"scalar must be positive, got {scalar}")
        del self.scalar, self.bias
        if learn_scalar:
            self.scalar = nn.Parameter(torch.tensor(float(scalar)))
        else:
            self.register_buffer("scalar", torch.tensor(float(scalar)))
        self.register_buffer("bias", torch.zeros(classes), persistent=False)

    def effective_weight(self) -> Tensor:
        return self.scalar * functional.normalize(self.weight, dim=1, eps=self.eps)

    def gain(self, pooled_BC: Tensor) -> Tensor:
        norm_B1: Tensor = pooled_BC.norm(dim=1, keepdim=True)
        return 1 / norm_B1.clamp_min(self.eps)
