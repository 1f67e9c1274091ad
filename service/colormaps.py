"""Colour look-up tables, 256×3 uint8, computed here so that serving needs no plotting library."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Colormap = Literal["turbo", "viridis", "inferno", "gray"]

# Ten evenly spaced colours of matplotlib's maps (public domain), interpolated linearly: off by at most 4 of 255.
_VIRIDIS = "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725"
_INFERNO = "000004 1b0c41 4a0c6b 781c6d a52c60 cf4446 ed6925 fb9b06 f7d13d fcffa4"
_GRAY = "000000 ffffff"

# Turbo as polynomials in x of degree 5, red, green, blue (Mikhailov, Google, Apache 2.0).
_TURBO = (
    (0.13572138, 4.61539260, -42.66032258, 132.13108234, -152.94239396, 59.28637943),
    (0.09140261, 2.19418839, 4.84296658, -14.18503333, 4.27729857, 2.82956604),
    (0.10667330, 12.64194608, -60.58204836, 110.36276771, -89.90310912, 27.34824973),
)


def _anchored(colours: str) -> NDArray[np.uint8]:
    anchors = np.array([list(bytes.fromhex(colour)) for colour in colours.split()], dtype=np.float64)
    at = np.linspace(0, len(anchors) - 1, 256)
    channels = [np.interp(at, np.arange(len(anchors)), anchors[:, c]) for c in range(3)]
    return np.stack(channels, axis=1).round().astype(np.uint8)


def _polynomial(coefficients: tuple[tuple[float, ...], ...]) -> NDArray[np.uint8]:
    x = np.linspace(0, 1, 256)
    channels = [np.polynomial.polynomial.polyval(x, channel) for channel in coefficients]
    return (np.stack(channels, axis=1).clip(0, 1) * 255).round().astype(np.uint8)


COLORMAPS: dict[Colormap, NDArray[np.uint8]] = {
    "turbo": _polynomial(_TURBO),
    "viridis": _anchored(_VIRIDIS),
    "inferno": _anchored(_INFERNO),
    "gray": _anchored(_GRAY),
}
