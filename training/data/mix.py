"""Two images in one: mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899), batch by batch on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from camcal.training.recipe import AugmentConfig


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """A batch of mixed images: the share λ is of the image's own class, 1 - λ of its partner's.

    λ is at least one half, so the first label is that of the larger part.
    """

    images_BHWC: Tensor
    labels_B: Tensor
    partners_B: Tensor
    share: float

    def loss(self, criterion: Callable[[Tensor, Tensor], Tensor], logits_BK: Tensor) -> Tensor:
        """λ·L(z, y) + (1 - λ)·L(z, y') for any loss L(logits, labels)."""
        own = criterion(logits_BK, self.labels_B)
        return own if self.share == 1 else self.share * own + (1 - self.share) * criterion(logits_BK, self.partners_B)


class Mix:
    """Draws one λ ~ Beta(α, α) per batch and a partner for each image, as the papers' code does.

    Every batch is mixed; CutMix's code skips half of the batches on CIFAR, and none on ImageNet.

    Args:
        config: `mixup` and `cutmix` are the α, 0 is off; with both, each batch takes one of them with equal chance.
        seed: of the draws, which are made on the CPU so that nothing waits for a GPU.
    """

    def __init__(self, config: AugmentConfig, seed: int) -> None:
        self.config = config
        self.random = np.random.default_rng(seed)

    def __call__(self, images_BHWC: Tensor, labels_B: Tensor) -> Mixed:
        """Mix a batch of floating point images; without mixing, the same tensors and λ = 1."""
        c = self.config
        if not c.mixup and not c.cutmix:
            return Mixed(images_BHWC=images_BHWC, labels_B=labels_B, partners_B=labels_B, share=1.0)
        cut = bool(c.cutmix) and (not c.mixup or self.random.random() < 0.5)
        alpha = c.cutmix if cut else c.mixup
        share = float(self.random.beta(alpha, alpha))
        partner_B = torch.from_numpy(self.random.permutation(len(labels_B))).to(labels_B.device, non_blocking=True)
        if cut:
            top, bottom, left, right = self._box(images_BHWC.shape[1], share)
            mixed_BHWC = images_BHWC.clone()
            mixed_BHWC[:, top:bottom, left:right] = images_BHWC[partner_B, top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / images_BHWC.shape[1] ** 2
        else:
            mixed_BHWC = share * images_BHWC + (1 - share) * images_BHWC[partner_B]
        labels, partners = labels_B, labels_B[partner_B]
        if share < 0.5:
            labels, partners, share = partners, labels, 1 - share
        return Mixed(images_BHWC=mixed_BHWC, labels_B=labels, partners_B=partners, share=share)

    def _box(self, size: int, share: float) -> tuple[int, int, int, int]:
        """Top, bottom, left and right of a square of area 1 - λ around a random centre, cut off at the border."""
        half = int(size * (1 - share) ** 0.5) // 2
        row, column = self.random.integers(size, size=2).tolist()
        return max(0, row - half), min(size, row + half), max(0, column - half), min(size, column + half)
