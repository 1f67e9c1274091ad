"""Where a map lies on its image.

A strided convolution with padding answers for the first pixel of each step, not for its middle, and training makes up
for a part of that only: a map lies some way right of and below what it shows. N images, h×w map size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camcal.models.cam import contributions
from camcal.models.classifier import LongTailClassifier
from camcal.models.enlargement import enlargement
from camcal.training.data import Images
from camcal.training.data.features import LabelledMaps, pictures

SAMPLES = 512
BATCH = 64
FINENESS = 8  # points for each position at which two maps are compared
SHIFTS = np.arange(-100, 101) / 100


@torch.no_grad()
def measure_shift(network: LongTailClassifier, images: Images, seed: int) -> float:
    """`map_shift` of a network in evaluation mode, by the maps of its predictions on some of `images`."""
    device = network.mean.device
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:SAMPLES].split(BATCH)
    weight_KC, bias_K = network.rows()
    pairs = []
    for plain_BChw, flipped_BChw in _both_ways(network, images, chosen, device):
        logits_BK, features_BChw = network.explain_maps(plain_BChw)
        best_B1 = logits_BK.argmax(dim=1, keepdim=True)
        rows = weight_KC[best_B1], bias_K[best_B1]
        mirrored_BChw = network.explain_maps(flipped_BChw).features_BChw
        pairs.append([contributions(maps, *rows).squeeze(1).cpu() for maps in (features_BChw, mirrored_BChw)])
    maps, mirrored = (torch.cat(part).numpy() for part in zip(*pairs, strict=True))
    return map_shift(maps, mirrored)


def _both_ways(
    network: LongTailClassifier, images: Images, chosen: Sequence[Tensor], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The trunk's maps of images and of their mirror images, where it has not seen both before."""
    if isinstance(images, LabelledMaps) and len(images.views) == 2:
        yield from images.pairs(chosen, device)
        return
    for images_BHWC, _ in pictures(images).batches(chosen, device):
        yield network.trunk_maps(images_BHWC), network.trunk_maps(images_BHWC.flip(2))


def map_shift(maps_Nhw: NDArray[np.float32], mirrored_Nhw: NDArray[np.float32]) -> float:
    """By how many positions maps lie to the right of what they show, between -1 and 1.

    A mirrored image should have the mirrored map. What it has lies off that by twice the shift: so it is the shift
    for which the two agree best when both are moved back, in the mean of the images' correlations. A network is no
    longer sure of an image upside down, so down the image the same is assumed: strides and paddings are the same, and
    gradients bear it out (docs/explanation/heatmaps.md).

    Args:
        maps_Nhw: of one class of each image.
        mirrored_Nhw: of the same classes and the same images, mirrored left to right.
    """
    if not np.ptp(maps_Nhw, axis=2).any():  # nothing tells one column from another
        return 0.0
    width = maps_Nhw.shape[2]
    moved = [enlargement(width, FINENESS * width, shift).T for shift in SHIFTS]
    agreement = [_correlation(maps_Nhw @ move, (mirrored_Nhw @ move)[:, :, ::-1]) for move in moved]
    return float(SHIFTS[np.argmax(agreement)])


def _correlation(ones: NDArray[np.float32], others: NDArray[np.float32]) -> float:
    centred = [part - part.mean(axis=(1, 2), keepdims=True) for part in (ones, others)]
    products = (centred[0] * centred[1]).sum(axis=(1, 2))
    norms = np.sqrt((centred[0] ** 2).sum(axis=(1, 2)) * (centred[1] ** 2).sum(axis=(1, 2)))
    return float((products / np.maximum(norms, np.finfo(np.float32).tiny)).mean())
