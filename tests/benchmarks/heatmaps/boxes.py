"""Photographs with one object box each: Tiny ImageNet's validation part, as its archive or in a folder."""

from __future__ import annotations

import csv
import tarfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from camcal.models.bundle import GROUPS, group_of
from camcal.models.preprocessing import Preprocessing
from camcal.training.data import DataError
from camcal.training.data.folder import decode

FULL = 0.9  # of the image: a box that covers more of it says nothing about the place

Box = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class BoxedImages:
    """N images as the network sees them, uint8 N×S×S×3, with labels, boxes in their pixels, and their classes' groups.

    Boxes are N×4: left, top, right and bottom, right and bottom exclusive.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    boxes: NDArray[np.int64]
    groups: list[str]

    def positions(self) -> dict[str, NDArray[np.int64]]:
        """Where the images of all groups together, and of each group that has any, are."""
        found = {name: np.flatnonzero(np.array(self.groups) == name) for name in GROUPS}
        return {"all": np.arange(len(self.labels))} | {name: index for name, index in found.items() if len(index)}


def unpack(archive: Path, folder: Path) -> Path:
    """The one folder that an archive holds, unpacked into `folder` unless it is there already."""
    with tarfile.open(archive) as tar:
        first = tar.next()
        if first is None:
            raise DataError(f"{archive} is empty")
        root = folder / Path(first.name).parts[0]
        if not (root / "unpacked").is_file():
            tar.extractall(folder, filter="data")
            (root / "unpacked").touch()
    return root


def is_usable(box: Box, width: int, height: int) -> bool:
    """Whether a box has an area and leaves a tenth of the image free; edges are pixels, the last ones included."""
    left, top, right, bottom = box
    area = (right - left + 1) * (bottom - top + 1)
    return right > left and bottom > top and area <= FULL * width * height


def scaled(box: Box, width: int, height: int, preprocessing: Preprocessing) -> Box:
    """A box of a width×height picture in the network's pixels, right and bottom exclusive from here on."""
    left, top, right, bottom = preprocessing.box(width, height)
    place = preprocessing.place(width, height)
    across, down = (place[2] - place[0]) / (right - left), (place[3] - place[1]) / (bottom - top)
    edges = np.array([box[0] - left, box[1] - top, box[2] + 1 - left, box[3] + 1 - top]) * [across, down, across, down]
    found = (edges + [place[0], place[1], place[0], place[1]]).round().astype(int).clip(0, preprocessing.input_size)
    return int(found[0]), int(found[1]), int(found[2]), int(found[3])


def load_boxes(
    root: Path,
    classes: Sequence[str],
    counts: Sequence[int],
    preprocessing: Preprocessing,
    per_group: int,
    seed: int,
    paths: Collection[str] | None = None,
) -> BoxedImages:
    """Validation images whose boxes are usable, drawn at random: at most `per_group` of each group; 0 takes all.

    Args:
        root: a folder with `boxes.csv` (path, split, label, xmin, ymin, xmax, ymax) and images at `val/CLASS/…`.
        classes: the network's class names, which are the names of the folders.
        counts: training images of each class.
        paths: the images to draw from, as `boxes.csv` names them; by default all.

    Raises:
        DataError: if a file or class does not fit, or no usable box is left.
    """
    of_class = {name: place for place, name in enumerate(classes)}
    rows: dict[str, list[tuple[Path, int, Box]]] = {group: [] for group in GROUPS}
    with (root / "boxes.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["split"] != "val" or (paths is not None and row["path"] not in paths):
                continue
            path = root / row["path"]
            if path.parent.name not in of_class:
                raise DataError(f"{path} is of a class that the network does not know")
            label = of_class[path.parent.name]
            with Image.open(path) as image:
                width, height = image.size
            box = int(row["xmin"]), int(row["ymin"]), int(row["xmax"]), int(row["ymax"])
            if is_usable(box, width, height):
                rows[group_of(counts[label])].append((path, label, scaled(box, width, height, preprocessing)))
    random = np.random.default_rng(seed)
    chosen: list[tuple[Path, int, Box]] = []
    for found in rows.values():
        order = random.permutation(len(found))[: per_group or None]
        chosen += [found[place] for place in np.sort(order)]
    if not chosen:
        raise DataError(f"{root} has no usable box in its validation part")
    images, labels = decode([(path, label) for path, label, _ in chosen], preprocessing)
    return BoxedImages(
        images=images,
        labels=labels,
        boxes=np.array([box for _, _, box in chosen], dtype=np.int64),
        groups=[group_of(counts[label]) for label in labels],
    )
