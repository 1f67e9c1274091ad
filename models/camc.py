"""Class activation map calibration: reinforce the positions that agree with the evidence for the expected class.

After the abstract of Zhang et al., arXiv 2108.12757: the module "highlights the correlated image regions across data
and reinforces the representations in these areas". Its equations are not available to us; the designs below are ours.

B batch, C channels, H W positions, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Evidence = Literal["weights", "prototypes", "both"]
Attention = Literal["sigmoid", "softmax"]


class CAMC(nn.Module):
    """F' = (1 + A)·F with an attention map A in [0, 1] from the correlation of each position with class evidence.

    For an image with expected class distribution p (the softmax of the logits of the plain map F):

    - E_k, the evidence of class k: the classifier's weights, or the class's prototype, or the sum of both. Each is a
      unit vector minus the mean over classes (`centred_rows`): features after a ReLU share one large direction, and
      what all classes share does not tell where one of them is.
    - e = Σ_k p_k·E_k, the expected evidence, over all classes or over the `top` most probable ones.
    - r_u = ⟨F_u/‖F_u‖, e/‖e‖⟩, its correlation with each position u, standardised over the positions of the image.
    - A_u = sigmoid(α·r_u), or exp(α·r_u) over its maximum, which is a softmax over positions whose peak is 1; α is a
      learned sharpness.

    A class's prototype is a moving average, over the training images of the class, of the unit mean feature of its
    important regions: positions weighted by the attention that the formula above gives for the true class. No label is
    used outside `update`, so training and serving take the same path.

    Args:
        width: channels C of the feature map.
        classes: number of classes K.
        evidence: where E comes from.
        attention: how correlation becomes A.
        top: number of classes in the expected evidence; 0 for all.
        momentum: of the prototypes' moving average, per batch that contains the class.

    Attributes:
        gather: sums a batch's evidence over the processes that train together; by default there is one.

    Raises:
        ValueError: if the momentum is not in [0, 1), or `top` not in 0..K.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        evidence: Evidence = "prototypes",
        attention: Attention = "sigmoid",
        top: int = 0,
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if not 0 <= top <= classes:
            raise ValueError(f"camc_top must be in 0..{classes}, the number of classes, got {top}")
        self.evidence = evidence
        self.form = attention
        self.top = top
        self.momentum = momentum
        self.gather: Callable[[Tensor], Tensor] = _alone
        self.alpha = nn.Parameter(torch.ones(()))
        self.register_buffer("prototypes", torch.zeros(classes, width))
        self.prototypes: Tensor

    def class_evidence(self, weight_KC: Tensor) -> Tensor:
        """E, K×C: unit rows; zero for a class without a prototype yet."""
        if self.evidence == "weights":
            return centred_rows(weight_KC)
        if self.evidence == "prototypes":
            return centred_rows(self.prototypes)
        return functional.normalize(centred_rows(weight_KC) + centred_rows(self.prototypes), dim=1)

    def attention(self, features_BCHW: Tensor, expected_BK: Tensor, weight_KC: Tensor) -> Tensor:
        """A, B×H×W in [0, 1], for features, the expected class distribution and the classifier's weights."""
        if self.top:
            expected_BK = expected_BK * (expected_BK >= expected_BK.topk(self.top, dim=1).values[:, -1:])
        evidence_BC = functional.normalize(expected_BK @ self.class_evidence(weight_KC), dim=1)
        unit_BCHW = functional.normalize(features_BCHW, dim=1, eps=1e-6)
        correlation_BU = (evidence_BC.unsqueeze(1) @ unit_BCHW.flatten(2)).squeeze(1)
        centred_BU = correlation_BU - correlation_BU.mean(dim=1, keepdim=True)
        # Without a prototype, or with a map of one position, the spread is zero, where the root's slope is infinite.
        # (Adding a number this small instead does not survive the optimiser of the ONNX export.)
        spread_B1 = centred_BU.square().mean(dim=1, keepdim=True).clamp_min(1e-8).sqrt()
        sharp_BU = self.alpha * centred_BU / spread_B1
        if self.form == "sigmoid":
            attention_BU = torch.sigmoid(sharp_BU)
        else:
            attention_BU = torch.exp(sharp_BU - sharp_BU.amax(dim=1, keepdim=True))
        return attention_BU.reshape(features_BCHW.shape[0], *features_BCHW.shape[2:])

    @torch.no_grad()
    def update(self, features_BCHW: Tensor, labels_B: Tensor, weight_KC: Tensor) -> None:
        """Move the prototypes of the labelled classes towards the features of their important regions in this batch."""
        # functional.one_hot may read the labels' values, which would wait for a GPU.
        classes_K = torch.arange(len(self.prototypes), device=labels_B.device)
        certain_BK = (labels_B.unsqueeze(1) == classes_K).to(weight_KC.dtype)
        attention_BHW = self.attention(features_BCHW, certain_BK, weight_KC)
        weights_BHW = attention_BHW / attention_BHW.sum(dim=(1, 2), keepdim=True)
        attended_BC = functional.normalize((features_BCHW * weights_BHW.unsqueeze(1)).sum(dim=(2, 3)), dim=1)
        sums_KC = torch.zeros_like(self.prototypes).index_add_(0, labels_B, attended_BC.to(self.prototypes.dtype))
        number_K1 = certain_BK.sum(dim=0).unsqueeze(1).to(sums_KC.dtype)
        sums_KC, number_K1 = self.gather(torch.cat([sums_KC, number_K1], dim=1)).split([sums_KC.shape[1], 1], dim=1)
        present_K1 = number_K1 > 0
        fresh_K1 = self.prototypes.abs().sum(dim=1, keepdim=True) == 0
        keep_K1 = torch.where(fresh_K1, 0.0, self.momentum)
        moved_KC = keep_K1 * self.prototypes + (1 - keep_K1) * functional.normalize(sums_KC, dim=1)
        self.prototypes.copy_(torch.where(present_K1, moved_KC, self.prototypes))


class TaughtAttention(nn.Module):
    """The second form: F'_u = HW·a_u·F_u, so that the mean of F' is Σ a_u·F_u, with attention that sums to one.

    a = softmax_u(v·tanh(V·f_u + b)) of the directions f_u = √C·F_u/‖F_u‖. v starts at zero, which is average pooling.
    An image's own prediction does not tell where its object is, so the attention is taught across the data, by the
    classifier's rows averaged over training, W̄:

    - `lesson`: KL(t ‖ a) with t = softmax_u(1.5·r_u), r_u = ⟨F_u/‖F_u‖, W̄_y/‖W̄_y‖⟩ standardised over the positions, of
      the true class y.
    - `exchange`: at every second position that is among the lowest 40 % by r in both, an image takes the features of
      its neighbour in the batch. Background common to both then carries no information.

    No label is used outside these two, so training and serving take the same path.

    Args:
        width: channels C of the feature map.
        classes: number of classes K.
        hidden: rows of V.
        momentum: of W̄, per batch.
    """

    sharpness = 1.5
    background = 0.4

    def __init__(self, width: int, classes: int, hidden: int = 128, momentum: float = 0.99) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.score = nn.Parameter(torch.zeros(hidden))
        self.momentum = momentum
        self.rows: Tensor
        self.register_buffer("rows", torch.zeros(classes, width))
        self.lesson = torch.zeros(())

    def log_attention(self, features_BCHW: Tensor) -> Tensor:
        """log a, B×H×W."""
        unit_BUC = functional.normalize(features_BCHW.flatten(2).transpose(1, 2), dim=2, eps=1e-6)
        scores_BU = torch.tanh(self.hidden(unit_BUC.shape[2] ** 0.5 * unit_BUC)) @ self.score
        return scores_BU.log_softmax(dim=1).reshape(features_BCHW.shape[0], *features_BCHW.shape[2:])

    @torch.no_grad()
    def follow(self, weight_KC: Tensor) -> None:
        """Move W̄ towards the classifier's rows."""
        fresh = (self.rows == 0).all()
        self.rows.lerp_(functional.normalize(weight_KC, dim=1), torch.where(fresh, 1.0, 1 - self.momentum))

    @torch.no_grad()
    def relevance(self, features_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """r, B×H×W, of the true classes."""
        unit_BCU = functional.normalize(features_BCHW.float().flatten(2), dim=1, eps=1e-6)
        rows_BC = functional.normalize(self.rows[labels_B], dim=1)
        found_BU = (rows_BC.unsqueeze(1) @ unit_BCU).squeeze(1)
        centred_BU = found_BU - found_BU.mean(dim=1, keepdim=True)
        spread_B1 = centred_BU.square().mean(dim=1, keepdim=True).clamp_min(1e-8).sqrt()
        return (centred_BU / spread_B1).reshape(features_BCHW.shape[0], *features_BCHW.shape[2:])

    def exchange(self, features_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """Features whose backgrounds come half from the next image of the batch."""
        relevance_BHW = self.relevance(features_BCHW, labels_B)
        flat_BU = relevance_BHW.flatten(1)
        low_BHW = relevance_BHW <= flat_BU.quantile(self.background, dim=1)[:, None, None]
        batch, height, width = low_BHW.shape
        image, row, column = (torch.arange(size, device=labels_B.device) for size in (batch, height, width))
        every_second = (image[:, None, None] + row[:, None] + column) % 2 == 0
        swapped_B1HW = (low_BHW & low_BHW.roll(-1, 0) & every_second).unsqueeze(1)
        return torch.where(swapped_B1HW, features_BCHW.roll(-1, 0), features_BCHW)

    def teach(self, features_BCHW: Tensor, log_BHW: Tensor, labels_B: Tensor) -> None:
        """Store the mean KL(t ‖ a) of a batch as `lesson`."""
        target_BU = (self.sharpness * self.relevance(features_BCHW.detach(), labels_B)).flatten(1).softmax(dim=1)
        self.lesson = functional.kl_div(log_BHW.flatten(1), target_BU, reduction="batchmean")


def _alone(evidence: Tensor) -> Tensor:
    return evidence


def centred_rows(rows_KC: Tensor) -> Tensor:
    """Unit rows minus their mean, normalised again; zero rows do not count in the mean and stay zero."""
    unit_KC = functional.normalize(rows_KC, dim=1)
    known_K1 = (rows_KC.abs().sum(dim=1, keepdim=True) > 0).to(rows_KC.dtype)
    mean_1C = unit_KC.sum(dim=0, keepdim=True) / known_K1.sum().clamp_min(1)
    return functional.normalize((unit_KC - mean_1C) * known_K1, dim=1, eps=1e-6)
