"""Images that need no file, and what a bundle's graph answered on them when the bundle was made.

The images are computed: a bundle then carries no photograph of anybody's, and stays small. They are no photographs, but
whether an engine computes what the graph says can be told by any image.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from camcal.models.untrusted import BundleError

CANARY_FILE = "canary.json"
MAX_CANARY_BYTES = 256 * 2**10
IMAGES = 4
MAX_VALUES = 6_000  # recorded for all images together, about 12 bytes each in JSON twice
TOP_K = 5


class Canary(BaseModel):
    """`canary.json`: the answers of the graph on the first N images of `canary_images`, for K classes.

    version: of the images.
    maps: of the best class.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    version: Literal[1]
    top_classes: list[list[int]] = Field(min_length=1, max_length=IMAGES)  # N×k
    logits: list[list[float]]  # N×K
    calibrated_probabilities: list[list[float]]  # N×K
    maps: list[list[list[float]]]  # N×h×w

    def check_shapes(self, classes: int, grid: tuple[int, int]) -> None:
        """Raises BundleError unless the answers are those of a model with so many classes and such maps."""
        height, width = grid
        count, top_k = len(self.top_classes), min(TOP_K, classes)
        fits = (
            all(len(row) == top_k and all(0 <= k < classes for k in row) for row in self.top_classes)
            and all(
                [len(row) for row in rows] == [classes] * count for rows in (self.logits, self.calibrated_probabilities)
            )
            and len(self.maps) == count
            and all(len(rows) == height and all(len(row) == width for row in rows) for rows in self.maps)
        )
        if not fits:
            raise BundleError(f"{CANARY_FILE} does not hold answers of {classes} classes with maps of {height}×{width}")


def canary_count(classes: int) -> int:
    """How many images are recorded: fewer where each has very many classes."""
    return max(1, min(IMAGES, MAX_VALUES // classes))


def canary_images(size: int, count: int = IMAGES) -> NDArray[np.uint8]:
    """`count` images of size×size: slopes, coloured squares, rings and coarse noise, the same on every machine."""
    y, x, c = np.ogrid[:size, :size, :3]
    last, cell, half = max(1, size - 1), max(1, size // 8), size // 2
    slopes = np.where(c == 0, x * 255 // last, np.where(c == 1, y * 255 // last, (x + y) * 255 // (2 * last)))
    squares = (x // cell * 37 + y // cell * 91 + c * 53) * 29 % 256
    rings = 255 - ((x - half) ** 2 + (y - half) ** 2) * (c + 2) * 1024 // (last * last) % 256
    mixed = (x // 2 * 73_856_093) ^ (y // 2 * 19_349_663) ^ (c * 83_492_791)
    noise = (mixed * mixed >> 11) % 256
    shape = (size, size, 3)
    images = [np.broadcast_to(image, shape).astype(np.uint8) for image in (slopes, squares, rings, noise)]
    return np.stack(images[:count])
