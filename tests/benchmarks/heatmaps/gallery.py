"""Photographs chosen by lot with their maps: `make heatmap-gallery`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from camcal.models.bundle import GROUPS, group_of
from camcal.models.classifier import LongTailClassifier
from camcal.service.heatmaps.heatmap import Scale, View, levels, overlay, positive_scale
from camcal.service.heatmaps.legend import PAPER, Caption
from camcal.service.heatmaps.sheet import side_by_side
from camcal.training.metrics import softmax
from tests.benchmarks.heatmaps import maps
from tests.benchmarks.heatmaps.comparison import Draw

TILE = 200  # px
COLUMNS = 2  # photographs side by side, each with three maps


def choose(labels_N: NDArray[np.int64], counts: Sequence[int], each: int, seed: int) -> NDArray[np.int64]:
    """The first `each` images of each group in one random order of all, the groups after one another."""
    order = np.random.default_rng(seed).permutation(len(labels_N))
    groups = np.array([group_of(counts[label]) for label in labels_N])[order]
    return np.concatenate([order[groups == group][:each] for group in GROUPS])


def draw(
    network: LongTailClassifier,
    images: NDArray[np.uint8],
    labels_N: NDArray[np.int64],
    names: Sequence[str],
    grad_cam: Draw,
) -> Image.Image:
    """A picture of N images S×S×3: each with the plain, the calibrated and the Grad-CAM map of what is predicted.

    Plain map and Grad-CAM explain the plain prediction, the calibrated map the calibrated one.
    """
    found = maps.answer(network, images)
    classes = found.classes(labels_N)
    raw_N, calibrated_N = classes["raw"], classes["calibrated"]
    shares_NK = softmax(found.logits), softmax(found.calibrated_logits / network.temperature.item())
    theirs = grad_cam(images, raw_N)
    shift, rows = network.shift, []
    for i, image in enumerate(images):
        picture = Image.fromarray(image).resize((TILE, TILE), Image.Resampling.BICUBIC)
        plain = _on(picture, found.maps[i, raw_N[i]], shift)
        calibrated = _on(picture, found.calibrated_maps[i, calibrated_N[i]], shift)
        peer = _on(picture, theirs[i], maps.UNMOVED, Scale(low=0, high=1, signed=False))
        raw, after = f"{shares_NK[0][i, raw_N[i]]:.0%}", f"{shares_NK[1][i, calibrated_N[i]]:.0%}"
        rows.append(
            side_by_side(
                [
                    (picture, Caption(title=names[labels_N[i]], detail="the photograph")),
                    (plain, Caption(title=names[raw_N[i]], detail=f"plain, {raw}")),
                    (calibrated, Caption(title=names[calibrated_N[i]], detail=f"calibrated, {after}")),
                    (peer, Caption(title=names[raw_N[i]], detail="Grad-CAM")),
                ]
            )
        )
    return _stack(rows)


def _on(
    picture: Image.Image, contributions: NDArray[np.float32], shift: maps.Shift, scale: Scale | None = None
) -> Image.Image:
    """A map laid on a copy of a picture, in the colours of `GET /cam`."""
    scale = scale or positive_scale(contributions)
    height, width = contributions.shape
    across, down = shift
    indices = levels(contributions, scale, picture.size, (across, down, width + across, height + down))
    return overlay(picture.copy(), indices, View(size=TILE), scale.signed)


def _stack(rows: Sequence[Image.Image]) -> Image.Image:
    width, height = rows[0].size
    canvas = Image.new("RGB", (COLUMNS * width, -(-len(rows) // COLUMNS) * height), PAPER)
    for place, row in enumerate(rows):
        canvas.paste(row, (place % COLUMNS * width, place // COLUMNS * height))
    return canvas
