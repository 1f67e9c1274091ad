"""How well maps find an object: four measures of them against one box an image.

N images, S side in pixels, T thresholds, L levels. Maps are N×S×S in [0, 1], each with its own minimum at 0 and maximum
at 1; boxes are N×4: left, top, right and bottom in pixels, right and bottom exclusive.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Maps = NDArray[np.float32]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TOLERANCE = 0.03  # of the side: the 15 px that Zhang et al. allow on photographs of 500 px
THRESHOLDS = np.arange(0, 1, 0.02)
OVERLAPS = (0.3, 0.5, 0.7)
LEVELS = 256
MEASURES = ("pointing", "energy", "max_box_acc_v2", "pxap")


def unit_range(maps_NSS: Maps) -> Maps:
    """Each map scaled to fill [0, 1], as Choe et al. (arXiv 2001.07437) do; a constant one becomes 0."""
    low_N11 = maps_NSS.min(axis=(1, 2), keepdims=True)
    span_N11 = maps_NSS.max(axis=(1, 2), keepdims=True) - low_N11
    return np.asarray((maps_NSS - low_N11) / np.where(span_N11 > 0, span_N11, 1), dtype=np.float32)


def cut(maps_NSS: Maps) -> Maps:
    """Each map from its median upwards, in [0, 1], as camcal draws its own: what most pixels have shows no place."""
    return unit_range((maps_NSS - np.median(maps_NSS, axis=(1, 2), keepdims=True)).clip(0))


def inside(boxes_N4: Ints, side: int) -> NDArray[np.bool_]:
    """Which pixels lie in the box, N×S×S."""
    left, top, right, bottom = (edge[:, None, None] for edge in boxes_N4.T)
    rows, columns = np.arange(side)[:, None], np.arange(side)
    return np.asarray((columns >= left) & (columns < right) & (rows >= top) & (rows < bottom))


def pointing(maps_NSS: Maps, boxes_N4: Ints, tolerance: float = TOLERANCE) -> NDArray[np.bool_]:
    """The pointing game (Zhang et al., arXiv 1608.00507): whether the highest point lies in the box or close to it.

    Args:
        tolerance: how far outside it may lie, as a share of the side.
    """
    side = maps_NSS.shape[1]
    rows, columns = np.divmod(maps_NSS.reshape(len(maps_NSS), -1).argmax(axis=1), side)
    left, top, right, bottom = boxes_N4.T
    across = np.maximum(0, np.maximum(left - columns, columns - right + 1))
    down = np.maximum(0, np.maximum(top - rows, rows - bottom + 1))
    return np.asarray(np.hypot(across, down) <= tolerance * side)


def energy(maps_NSS: Maps, inside_NSS: NDArray[np.bool_]) -> Floats:
    """The energy-based pointing game (Wang et al., Score-CAM, arXiv 1910.01279): the box's share of the map's sum."""
    total_N = maps_NSS.sum(axis=(1, 2), dtype=np.float64)
    caught_N = (maps_NSS * inside_NSS).sum(axis=(1, 2), dtype=np.float64)
    return np.asarray(caught_N / np.where(total_N > 0, total_N, 1))


def overlaps(map_SS: Maps, box_4: Ints) -> Floats:
    """For each threshold the highest intersection over union of the box with that of a connected region above it."""
    left, top, right, bottom = box_4
    found = np.zeros(len(THRESHOLDS))
    for place, threshold in enumerate(THRESHOLDS):
        regions, _ = ndimage.label(map_SS > threshold, structure=np.ones((3, 3)))
        for rows, columns in ndimage.find_objects(regions):
            width, height = columns.stop - columns.start, rows.stop - rows.start
            across = min(right, columns.stop) - max(left, columns.start)
            down = min(bottom, rows.stop) - max(top, rows.start)
            both = max(0, across) * max(0, down)
            found[place] = max(found[place], both / (width * height + (right - left) * (bottom - top) - both))
    return found


def max_box_acc_v2(overlaps_NT: Floats) -> float:
    """MaxBoxAccV2 (Choe et al., arXiv 2007.04178): the share of images with a well placed box at the best threshold.

    Well placed is an overlap of 0.3, 0.5 or 0.7: the mean of the three shares, each at its own best threshold.
    """
    return float(np.mean([(overlaps_NT >= least).mean(axis=0).max() for least in OVERLAPS]))


def histograms(maps_NSS: Maps, chosen_NSS: NDArray[np.bool_]) -> Ints:
    """How many of the chosen pixels of each map have each level, N×L."""
    levels_NSS = np.minimum((maps_NSS * LEVELS).astype(np.int64), LEVELS - 1)
    return np.stack([np.bincount(m[c], minlength=LEVELS) for m, c in zip(levels_NSS, chosen_NSS, strict=True)])


def pxap(inside_NL: Ints, outside_NL: Ints) -> float:
    """PxAP (Choe et al., arXiv 2007.04178): the average precision of all images' pixels together, the box for the mask.

    The sum over the thresholds, from the highest down, of the precision times the growth of the recall.
    """
    hits_L, others_L = (part_NL.sum(axis=0)[::-1].cumsum() for part_NL in (inside_NL, outside_NL))
    precision_L = hits_L / np.maximum(hits_L + others_L, 1)
    recall_L = hits_L / max(hits_L[-1], 1)
    return float((precision_L * np.diff(recall_L, prepend=0)).sum())


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What each image adds to the measures."""

    hits_N: NDArray[np.bool_]
    energy_N: Floats
    overlaps_NT: Floats
    inside_NL: Ints
    outside_NL: Ints


def statistics(maps_NSS: Maps, boxes_N4: Ints) -> Statistics:
    """The statistics of maps in [0, 1]."""
    inside_NSS = inside(boxes_N4, maps_NSS.shape[1])
    return Statistics(
        hits_N=pointing(maps_NSS, boxes_N4),
        energy_N=energy(maps_NSS, inside_NSS),
        overlaps_NT=np.stack([overlaps(m, box) for m, box in zip(maps_NSS, boxes_N4, strict=True)]),
        inside_NL=histograms(maps_NSS, inside_NSS),
        outside_NL=histograms(maps_NSS, ~inside_NSS),
    )


def measures(found: Statistics, index: Ints) -> dict[str, float]:
    """The four measures over the images at these positions, which may repeat, and their mean."""
    values = {
        "pointing": float(found.hits_N[index].mean()),
        "energy": float(found.energy_N[index].mean()),
        "max_box_acc_v2": max_box_acc_v2(found.overlaps_NT[index]),
        "pxap": pxap(found.inside_NL[index], found.outside_NL[index]),
    }
    return values | {"mean": sum(values.values()) / len(values)}


def lead(ours: Statistics, theirs: Statistics, index: Ints, resamples: int = 500) -> tuple[float, float, float]:
    """How far our mean is ahead of theirs on the same images, and the 95 % interval of a paired bootstrap."""

    def ahead(chosen: Ints) -> float:
        return measures(ours, chosen)["mean"] - measures(theirs, chosen)["mean"]

    random = np.random.default_rng(0)
    drawn = [ahead(random.choice(index, len(index))) for _ in range(resamples)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return ahead(index), float(low), float(high)


def centre(count: int, side: int) -> Maps:
    """The centre baseline: the same Gaussian in the middle of every image, N×S×S; σ is a quarter of the side (ours)."""
    distance_S = (np.arange(side) - (side - 1) / 2) / (side / 4)
    bell_S = np.exp(-(distance_S**2) / 2)
    return np.repeat(unit_range(np.outer(bell_S, bell_S)[None].astype(np.float32)), count, axis=0)
