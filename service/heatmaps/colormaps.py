"""Colour maps as 256×3 uint8 tables, computed here so that the service needs no plotting library."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Colormap = Literal["turbo", "viridis", "magma", "inferno", "gray", "coolwarm"]
DEFAULT: Colormap = "turbo"
DEFAULT_SIGNED: Colormap = "coolwarm"  # of heatmaps with zero in the middle of the colours

# Every 15th colour of matplotlib's maps, interpolated linearly; the error is at most 7 of 255. Turbo is by Mikhailov,
# coolwarm by Moreland, the others by van der Walt and Smith; all are free to use. coolwarm is diverging.
_ANCHORS: dict[Colormap, str] = {
    "turbo": (
        "30123b 3f3e9c 4666dd 458cfd 2fb2f4 1ad4d0 22ebaa 52fa7a 8bff4b "
        "b7f735 dbe236 f5c53a fea130 f9751d e84b0c ce2d04 a91601 7a0403"
    ),
    "viridis": (
        "440154 481769 472a7a 433d84 3d4e8a 355e8d 2e6d8e 297b8e 23898e "
        "1f978b 21a585 2eb37c 46c06f 65cb5e 89d548 b0dd2f d8e219 fde725"
    ),
    "magma": (
        "000004 090720 1a1042 311165 4a1079 621980 792282 912b81 aa337d "
        "c23b75 d9466b ec5860 f7725c fc8e64 feaa74 fec68a fde2a3 fcfdbf"
    ),
    "inferno": (
        "000004 0a0722 1e0c45 380962 510e6c 69166e 801f6c 982766 b0315b "
        "c63d4d d94d3d e9612b f47918 fa9407 fcb014 f8cd37 f2ea69 fcffa4"
    ),
    "gray": "000000 ffffff",
    "coolwarm": (
        "3b4cc0 4c66d6 5f7fe8 7396f5 88abfd 9dbdff b1cbfc c4d5f3 d5dbe5 "
        "e4d9d2 f0cdbb f6bea4 f7aa8c f39475 e97a5f dc5d4a ca3b37 b40426"
    ),
}


def _table(colours: str) -> NDArray[np.uint8]:
    anchors = np.array([list(bytes.fromhex(colour)) for colour in colours.split()], dtype=np.float64)
    at = np.linspace(0, len(anchors) - 1, 256)
    channels = [np.interp(at, np.arange(len(anchors)), anchors[:, c]) for c in range(3)]
    return np.stack(channels, axis=1).round().astype(np.uint8)


COLORMAPS: dict[Colormap, NDArray[np.uint8]] = {name: _table(colours) for name, colours in _ANCHORS.items()}
