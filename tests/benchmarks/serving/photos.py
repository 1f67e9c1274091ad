"""Photographs for the benchmark: cuts of the two real ones that scikit-learn ships, as JPEG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

SIZE = (500, 375)
QUALITY = 92  # 57 KB on average, the size of an ordinary photograph of 500×375 pixels
COUNT = 64


def write_photos(folder: Path, count: int = COUNT, seed: int = 0) -> list[Path]:
    """Write `count` JPEG files of 500×375 pixels: random cuts of at least 70 % of each side, half of them mirrored."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    paths = []
    for number in range(count):
        image = sources[number % len(sources)]
        share = rng.uniform(0.7, 1.0)
        width, height = share * image.width, share * image.height
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
        photo = image.resize(SIZE, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        if rng.random() < 0.5:
            photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        paths.append(folder / f"{number:03}.jpg")
        photo.save(paths[-1], "JPEG", quality=QUALITY)
    return paths
