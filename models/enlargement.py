"""Interpolation of a map's positions to the pixels of a picture, the same in training and serving."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def enlargement(count: int, size: int, start: float = 0.0, span: float | None = None) -> NDArray[np.float32]:
    """The weight of each of `count` values in each of `size` pixels, size×count; rows sum to 1.

    The values are evenly spaced, each in the middle of its part of a row of length `count`. The pixels divide the part
    of the row from `start` on whose length is `span`, by default `count`. Cubic convolution with a = -1/2 (Keys, 1981);
    the outermost values are repeated beyond the edges.
    """
    at = start + (np.arange(size) + 0.5) * ((count if span is None else span) / size) - 0.5
    first = np.floor(at).astype(np.int64)
    t = at - first
    taps = (
        ((2 - t) * t - 1) * t / 2,
        ((3 * t - 5) * t * t + 2) / 2,
        ((4 - 3 * t) * t + 1) * t / 2,
        (t - 1) * t * t / 2,
    )
    weights = np.zeros((size, count))
    for offset, tap in enumerate(taps, start=-1):
        np.add.at(weights, (np.arange(size), (first + offset).clip(0, count - 1)), tap)
    return weights.astype(np.float32)
