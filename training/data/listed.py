"""Images named by list files, `relative/path label` per line, decoded by threads ahead of training."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camcal.cpus import usable_cpus
from camcal.models.headers import read_header
from camcal.models.pictures import read_file, read_picture
from camcal.models.preprocessing import Preprocessing
from camcal.training.data.augment import Augment
from camcal.training.data.dataset import DataError, path_below
from camcal.training.recipe import AugmentConfig

AHEAD = 3
"""Batches decoded ahead of the one in use."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class ListedImages:
    """N images in files under `root`, with their labels (int64, N)."""

    root: Path
    names: list[str]
    labels: Tensor
    preprocessing: Preprocessing

    @property
    def images(self) -> Tensor:
        """All of them, decoded now: uint8 N×S×S×3."""
        return next(self.batches([torch.arange(len(self))], torch.device("cpu")))[0]

    @property
    def side(self) -> int:
        """S, px."""
        return self.preprocessing.input_size

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, index: NDArray[np.int64]) -> ListedImages:
        """The images at these positions, in this order."""
        return replace(self, names=[self.names[i] for i in index], labels=self.labels[torch.from_numpy(index)])

    def joined(self, others: ListedImages) -> ListedImages:
        """These and then the others, which must lie under the same root."""
        return replace(self, names=self.names + others.names, labels=torch.cat([self.labels, others.labels]))

    def to(self, device: torch.device) -> ListedImages:
        """The same: the images stay in their files."""
        return self

    def batches(
        self, indices: Sequence[Tensor], device: torch.device, augment: Augment | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See `camcal.training.data.dataset.Images.batches`.

        Random crops are cut from the whole picture while decoding, and a JPEG is decoded at a fraction of its size if
        that is enough; all other augmentation happens on the device.

        Raises:
            DataError: naming a file that cannot be read.
        """
        crop = None if augment is None else RandomCrop(augment.config, self.preprocessing, augment.draw_seed())
        pool = ThreadPoolExecutor(usable_cpus())
        started: deque[tuple[Tensor, list[Future[Pixels]]]] = deque()
        draws = itertools.count()
        try:
            for index_B in indices:
                futures = [
                    pool.submit(self._read, i, crop, draw) for i, draw in zip(index_B.tolist(), draws, strict=False)
                ]
                started.append((index_B, futures))
                if len(started) > AHEAD:
                    yield self._finish(*started.popleft(), device, augment)
            while started:
                yield self._finish(*started.popleft(), device, augment)
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, position: int, crop: RandomCrop | None, draw: int) -> Pixels:
        path = self.root / self.names[position]
        try:
            if crop is not None:
                return crop(path.read_bytes(), draw)
            return read_file(path).pixels(self.preprocessing)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}") from None

    def _finish(
        self, index_B: Tensor, pixels: list[Future[Pixels]], device: torch.device, augment: Augment | None
    ) -> tuple[Tensor, Tensor]:
        size = self.preprocessing.input_size
        stacked = np.stack([future.result() for future in pixels]) if pixels else np.empty((0, size, size, 3), np.uint8)
        images_BHWC, labels_B = torch.from_numpy(stacked), self.labels[index_B]
        if device.type == "cuda":
            images_BHWC = images_BHWC.pin_memory()
        images_BHWC = images_BHWC.to(device, non_blocking=True)
        labels_B = labels_B.to(device, non_blocking=True)
        return (augment(images_BHWC, cropped=True) if augment else images_BHWC), labels_B


@dataclass(frozen=True)
class RandomCrop:
    """A random part of a picture by `area` and `aspect`; without them, the part that serving uses."""

    config: AugmentConfig
    preprocessing: Preprocessing
    seed: int

    def __call__(self, data: bytes, draw: int) -> Pixels:
        """Image file to pixels, S×S×3; the crop depends on seed and draw number only, not on the thread.

        Raises:
            ValueError: if serving would not accept the file.
        """
        header, size = read_header(data), self.preprocessing.input_size
        left, top, right, bottom = self.box(*header.upright, draw)
        # Decode a JPEG at 1/2, 1/4 or 1/8 if the crop still has `size` pixels per side.
        room = min(right - left, bottom - top) / size if header.format == "JPEG" else 1
        picture = read_picture(data, header, next((factor for factor in (8, 4, 2) if room >= factor), 1))
        # Only the decoded picture shows how other formats are rotated.
        width, height = header.upright if header.format == "JPEG" else picture.rgb.size
        across, down = picture.rgb.width / width, picture.rgb.height / height
        if self.whole:
            return picture.pixels(self.preprocessing, (width, height))
        left, top, right, bottom = self.box(width, height, draw)
        box = (left * across, top * down, right * across, bottom * down)
        return np.asarray(picture.resized((size, size), box, self.preprocessing.resampling))

    @property
    def whole(self) -> bool:
        """Whether there is nothing random."""
        return self.config.area == (1.0, 1.0) and self.config.aspect == (1.0, 1.0)

    def box(self, width: int, height: int, draw: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the crop in a picture of this size."""
        c = self.config
        if self.whole:
            return self.preprocessing.box(width, height)
        random = np.random.default_rng((self.seed, draw))
        for _ in range(10):
            area = random.uniform(*c.area) * width * height
            aspect = math.exp(random.uniform(math.log(c.aspect[0]), math.log(c.aspect[1])))
            across, down = math.sqrt(area * aspect), math.sqrt(area / aspect)
            if across <= width and down <= height:
                left, top = random.uniform(0, width - across), random.uniform(0, height - down)
                return left, top, left + across, top + down
        return self.preprocessing.box(width, height)


def read_list(path: Path) -> tuple[list[str], NDArray[np.int64]]:
    """Paths and labels of a list file.

    Raises:
        DataError: if the file is missing or empty, or naming the line that is not `relative/path label`, or leads out
            of the folder.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # Excel writes a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the list {path} cannot be read: {error}") from None
    names, labels = [], []
    for number, line in enumerate(lines, start=1):
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdecimal():
            if not line.strip():
                continue
            raise DataError(f"{path}, line {number}: expected `relative/path label`, found {line.strip()!r}")
        if (below := path_below(name.strip())) is None:
            raise DataError(f"{path}, line {number}: {line.strip()!r} leaves data.root: paths must stay below it")
        names.append(below)
        labels.append(int(label))
    if not names:
        raise DataError(f"the list {path} names no image")
    return names, np.array(labels, dtype=np.int64)


def class_names(names: Sequence[str], labels: NDArray[np.int64], classes: int) -> list[str]:
    """A name for each class: the folder of its images if no other class shares it, else the label."""
    folders: list[set[str]] = [set() for _ in range(classes)]
    for name, label in zip(names, labels, strict=True):
        folders[label].add(PurePosixPath(name).parent.name)
    found = [next(iter(each)) if len(each) == 1 else "" for each in folders]
    unique = all(found) and len(set(found)) == classes
    return found if unique else [str(label) for label in range(classes)]


def load(
    root: Path, train_list: str, test_list: str, preprocessing: Preprocessing
) -> tuple[list[str], ListedImages, ListedImages]:
    """Class names, training part and test part; the lists' own paths are relative to `root`, or absolute.

    Raises:
        DataError: if a list does not fit, or its first image is not there.
    """
    parts = []
    for name in (train_list, test_list):
        names, labels = read_list(root / name)
        if not (root / names[0]).is_file():
            raise DataError(f"{root / names[0]}, the first image of {name}, is missing: is data.root right?")
        part = ListedImages(root=root, names=names, labels=torch.from_numpy(labels), preprocessing=preprocessing)
        parts.append(part)
    train, test = parts
    classes = int(train.labels.max()) + 1
    if int(test.labels.max()) >= classes:
        raise DataError(f"{test_list} has the label {int(test.labels.max())}; {train_list} ends at {classes - 1}")
    return class_names(train.names, train.labels.numpy(), classes), train, test
