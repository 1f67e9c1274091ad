"""camcal's own maps, as exact contributions and as pixels.

N images, P pairs of an image and a class, S side in pixels, h w map size, K classes.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from camcal.models import cam
from camcal.models.classifier import LongTailClassifier
from camcal.models.enlargement import enlargement
from camcal.service.heatmaps.heatmap import positive_scale
from tests.benchmarks.heatmaps.localisation import Maps, unit_range

BATCH = 64

Shift = tuple[float, float]
"""Positions to the right and down, see `LongTailClassifier.shift`."""

UNMOVED: Shift = (0.0, 0.0)


class Answers(NamedTuple):
    """Plain and calibrated logits, N×K, and both kinds of maps of all classes, N×K×h×w."""

    logits: NDArray[np.float32]
    calibrated_logits: NDArray[np.float32]
    maps: Maps
    calibrated_maps: Maps

    def classes(self, labels_N: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """The classes to explain: the true one, and those that the plain and the calibrated logits predict."""
        return {
            "true": labels_N,
            "raw": self.logits.argmax(axis=1),
            "calibrated": self.calibrated_logits.argmax(axis=1),
        }


@torch.no_grad()
def answer(network: LongTailClassifier, images: NDArray[np.uint8]) -> Answers:
    """What the network, in evaluation mode, says of images N×S×S×3."""
    weight_KC, bias_K = network.rows()
    found: list[tuple[NDArray[np.float32], ...]] = []
    for images_BHWC in torch.from_numpy(images).split(BATCH):
        logits_BK, features_BChw = network.explain(images_BHWC)
        maps_BKhw = cam.contributions(features_BChw, weight_KC[None], bias_K[None])
        calibrated_BKhw = cam.calibrated(maps_BKhw, network.marc.omega, network.marc.beta, network.weight_norms())
        parts = (logits_BK, network.calibrate(logits_BK), maps_BKhw, calibrated_BKhw)
        found.append(tuple(part.numpy() for part in parts))
    return Answers(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


@torch.no_grad()
def leaning(network: LongTailClassifier, images: NDArray[np.uint8], classes_P: NDArray[np.int64], lean: float) -> Maps:
    """Plain maps that lean less to their class, P×h×w, of one class of each image; they sum to its logit as well.

    With ĝ the mean of F̂, W_k has a part along ĝ and one at right angles to it, W_k = A_k + R_k. ⟨A_k, F̂_u⟩ is the share
    of position u in what the image shows at all, in units of the logit. ⟨R_k, F̂_u⟩ says how much more u leans to class
    k than the image as a whole, and sums to zero. These maps are of A_k + `lean`·R_k; with 1 they are the plain ones.
    """
    weight_KC, bias_K = network.rows()
    found = []
    for index in torch.arange(len(images)).split(BATCH):
        _, features_BChw = network.explain(torch.from_numpy(images[index]))
        rows_B1C = weight_KC[classes_P[index]].unsqueeze(1)
        direction_B1C = functional.normalize(features_BChw.mean(dim=(2, 3))).unsqueeze(1)
        along_B1C = (rows_B1C * direction_B1C).sum(dim=2, keepdim=True) * direction_B1C
        rows_B1C = along_B1C + lean * (rows_B1C - along_B1C)
        found.append(cam.contributions(features_BChw, rows_B1C, bias_K[classes_P[index]].unsqueeze(1)).squeeze(1))
    return torch.cat(found).numpy()


def without_camc(network: LongTailClassifier) -> LongTailClassifier:
    """The same weights with the module switched off: maps of F instead of F'."""
    plain = copy.deepcopy(network)
    plain.camc = None
    return plain.eval()


def enlarge(maps_Phw: Maps, side: int, shift: Shift = UNMOVED) -> Maps:
    """Maps in pixels, P×S×S, by the interpolation that heatmaps are drawn with."""
    across, down = shift
    rows, columns = enlargement(maps_Phw.shape[1], side, down), enlargement(maps_Phw.shape[2], side, across)
    return np.asarray(rows @ maps_Phw @ columns.T)


def scaled(maps_Phw: Maps, side: int, shift: Shift = UNMOVED) -> Maps:
    """Exact contributions as maps in [0, 1], P×S×S, each from its lowest to its highest value."""
    return unit_range(enlarge(maps_Phw, side, shift))


def drawn(maps_Phw: Maps, side: int, shift: Shift = UNMOVED) -> Maps:
    """The same in the colours' range: from 0, or the map's median where that is higher, to its highest contribution."""
    pixels = enlarge(maps_Phw, side, shift)
    for place, contributions in enumerate(maps_Phw):
        scale = positive_scale(contributions)
        pixels[place] -= scale.low
        pixels[place] /= max(scale.high - scale.low, 1e-12)
    return unit_range(pixels.clip(0, 1))
