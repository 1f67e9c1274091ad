"""The shift of a map against its image.

A strided convolution with padding responds to the first pixel of each step, not to its middle, and training compensates
only a part of that: maps lie somewhat right of and below what they show. N images, h×w map size.
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
FINENESS = 8  # points per position at which two maps are compared
SHIFTS = np.arange(-100, 101) / 100


@torch.no_grad()
def measure_shift(network: LongTailClassifier, images: Images, seed: int) -> float:
    """`map_shift` of a network in evaluation mode, from the maps of its predictions on some of `images`."""
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
    """The trunk's maps of images and of their mirror images, computed unless both are cached."""
    if isinstance(images, LabelledMaps) and len(images.views) == 2:
        yield from images.pairs(chosen, device)
        return
    for images_BHWC, _ in pictures(images).batches(chosen, device):
        yield network.trunk_maps(images_BHWC), network.trunk_maps(images_BHWC.flip(2))


def map_shift(maps_Nhw: NDArray[np.float32], mirrored_Nhw: NDArray[np.float32]) -> float:
    """The number of positions by which maps lie to the right of what they show, between -1 and 1.

    A mirrored image should have the mirrored map, and is off by twice the shift. The result is the shift for which the
    two agree best when both are moved back, by the mean correlation over the images. The vertical shift is assumed to
    be the same: networks recognise images upside down too poorly to measure it, but strides and paddings are equal, and
    gradients confirm it (docs/explanation/heatmaps.md).

    Args:
        maps_Nhw: of one class of each image.
        mirrored_Nhw: of the same classes and images, mirrored left to right.
    """
    if not np.ptp(maps_Nhw, axis=2).any():  # all columns are equal
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
