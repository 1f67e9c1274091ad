"""How much of a prediction depends on what a map marks: ROAD, insertion and deletion for one image and one class.

Images are S×S×3 with values in 0..255; an order is the image's S² pixels by relevance, the most relevant first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse
from scipy.sparse.linalg import spsolve

Pixels = NDArray[np.float32]
Floats = NDArray[np.float64]
Order = NDArray[np.int64]
Judge = Callable[[Pixels], Floats]
"""From images, B×S×S×3, to the probability of the class, B."""

STEPS = 28
REMOVED = (0.2, 0.4, 0.6, 0.8)
NOISE = 2.55  # standard deviation: 0.01 of the range of values, as in the reference code of ROAD
# Rong et al. give the four next neighbours twice the weight of the diagonal ones.
NEIGHBOURS = {
    (down, right): 1 / 6 if 0 in (down, right) else 1 / 12
    for down in (-1, 0, 1)
    for right in (-1, 0, 1)
    if (down, right) != (0, 0)
}


def by_relevance(map_SS: NDArray[np.float32], random: np.random.Generator) -> Order:
    """The pixels of a map from its highest value down; equal ones in random order."""
    flat = map_SS.ravel()
    return np.lexsort((random.permutation(flat.size), -flat))


def staged(start_SS3: Pixels, end_SS3: Pixels, order: Order, steps: int) -> Pixels:
    """From one image to another in equal steps: (steps+1)×S×S×3, the first pixels of the order first."""
    flat = np.repeat(start_SS3.reshape(1, -1, 3), steps + 1, axis=0)
    for step in range(steps + 1):
        moved = order[: round(len(order) * step / steps)]
        flat[step, moved] = end_SS3.reshape(-1, 3)[moved]
    return flat.reshape(steps + 1, *start_SS3.shape)


def area_under(values: Floats) -> float:
    """The area under equally spaced values over [0, 1], by trapezoids."""
    return float((values[1:] + values[:-1]).mean() / 2)


def deletion(image_SS3: Pixels, order: Order, judge: Judge, mean_3: Floats, steps: int = STEPS) -> float:
    """The area under the probability while pixels become the mean colour (Petsiuk et al., arXiv 1806.07421)."""
    blank_SS3 = np.broadcast_to(mean_3, image_SS3.shape).astype(np.float32)
    return area_under(judge(staged(image_SS3, blank_SS3, order, steps)))


def insertion(image_SS3: Pixels, order: Order, judge: Judge, steps: int = STEPS) -> float:
    """The area under the probability while pixels come back to a blurred image (Petsiuk et al., arXiv 1806.07421).

    Their blur has σ = 5 px on 224 px; here it is the same share of the side.
    """
    sigma = 5 / 224 * len(image_SS3)
    blurred_SS3 = ndimage.gaussian_filter(image_SS3, sigma=(sigma, sigma, 0))
    return area_under(judge(staged(blurred_SS3, image_SS3, order, steps)))


def impute(image_SS3: Pixels, removed: Order, random: np.random.Generator, noise: float = NOISE) -> Pixels:
    """The image with pixels replaced by noisy linear imputation (Rong et al., ROAD, arXiv 2202.00449).

    Every removed pixel is the weighted mean of its neighbours, removed ones included: a sparse system of equations.
    """
    side = len(image_SS3)
    equation_of = np.full(side * side, -1)
    equation_of[removed] = np.arange(len(removed))
    rows, columns = np.divmod(removed, side)
    flat = image_SS3.reshape(-1, 3).astype(np.float64)
    known, total = np.zeros((len(removed), 3)), np.zeros(len(removed))
    entries: list[tuple[Floats, Order, Order]] = []
    for (down, right), weight in NEIGHBOURS.items():
        row, column = rows + down, columns + right
        exists = np.flatnonzero((row >= 0) & (row < side) & (column >= 0) & (column < side))
        neighbour = row[exists] * side + column[exists]
        total[exists] += weight
        is_known = equation_of[neighbour] < 0
        known[exists[is_known]] += weight * flat[neighbour[is_known]]
        unknown = equation_of[neighbour[~is_known]]
        entries.append((np.full(len(unknown), -weight), exists[~is_known], unknown))
    entries.append((total, np.arange(len(removed)), np.arange(len(removed))))
    values, at, of = (np.concatenate(parts) for parts in zip(*entries, strict=True))
    system = sparse.csc_matrix((values, (at, of)), shape=(len(removed), len(removed)))
    filled = flat.copy()
    filled[removed] = spsolve(system, known).reshape(-1, 3) + noise * random.standard_normal((len(removed), 3))
    return filled.reshape(image_SS3.shape).astype(np.float32)


def road(
    image_SS3: Pixels,
    order: Order,
    judge: Judge,
    random: np.random.Generator,
    shares: Sequence[float] = REMOVED,
) -> float:
    """ROAD combined: half of how much more probable the class is without the least relevant than the most relevant.

    The mean over the shares of pixels that are removed, as pytorch-grad-cam's ROADCombined has it.
    """
    counts = [round(share * len(order)) for share in shares]
    parts = [order[len(order) - count :] for count in counts] + [order[:count] for count in counts]
    probabilities = judge(np.stack([impute(image_SS3, part, random) for part in parts]))
    least, most = probabilities[: len(counts)], probabilities[len(counts) :]
    return float((least - most).mean() / 2)
