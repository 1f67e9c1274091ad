"""Where the contributions of a map's positions come from: `python -m tests.benchmarks.heatmaps placement RUN`.

A check of `map_shift` by another way, down the image as well as across. N images, h×w map size.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camcal.models.cam import contributions
from camcal.models.classifier import LongTailClassifier

BORDER = 2  # positions from the edge that are left out: what lies beyond it has no gradient
BATCH = 32


def lean(network: LongTailClassifier, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """By how many positions a position lies to the right of and below what its contribution depends on, N×2.

    That is the centroid of the squared gradient, with respect to the image, of what the position contributes to the
    predicted class: the centre of its effective receptive field (Luo et al., arXiv 1701.04128). The mean over the
    positions away from the edges is returned.
    """
    parts = torch.from_numpy(images).split(BATCH)
    return torch.cat([_lean(network, part.float().requires_grad_()) for part in parts]).numpy()


def _lean(network: LongTailClassifier, images_NHWC: Tensor) -> Tensor:
    logits_NK, features_NChw = network.explain(images_NHWC)
    weight_KC, bias_K = network.rows()
    best_N1 = logits_NK.argmax(dim=1, keepdim=True)
    maps_Nhw = contributions(features_NChw, weight_KC[best_N1], bias_K[best_N1]).squeeze(1)
    height, width = maps_Nhw.shape[1:]
    found = []
    for row in range(BORDER, height - BORDER):
        for column in range(BORDER, width - BORDER):
            (gradient_NHWC,) = torch.autograd.grad(maps_Nhw[:, row, column].sum(), images_NHWC, retain_graph=True)
            energy_NHW = gradient_NHWC.double().square().sum(dim=3)
            across_N = column + 0.5 - width * _centroid(energy_NHW.sum(dim=1))
            down_N = row + 0.5 - height * _centroid(energy_NHW.sum(dim=2))
            found.append(torch.stack([across_N, down_N], dim=1))
    return torch.stack(found).mean(dim=0)


def _centroid(energy_NS: Tensor) -> Tensor:
    """As a share of the side, from 0 to 1."""
    side = energy_NS.shape[1]
    centres_S = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    return (energy_NS @ centres_S) / energy_NS.sum(dim=1)
