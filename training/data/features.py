"""Feature maps of images from a frozen trunk, computed once and cached on disk. N images, C channels, h w map size."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from camcal.models.classifier import LongTailClassifier
from camcal.training.data import Dataset, Images, LabelledImages
from camcal.training.data.augment import Augment
from camcal.training.recipe import Recipe

Maps = NDArray[np.float16]
View = Literal["plain", "mirrored"]

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class LabelledMaps(LabelledImages):
    """Images and a trunk's maps of them, which `batches` gives in place of the images.

    views: the maps of the images as they are and, if there are two, mirrored, M×C×h×w each.
    rows: the row of each image in the views, N.
    """

    views: list[Maps]
    rows: NDArray[np.int64]

    def subset(self, index: NDArray[np.int64]) -> LabelledMaps:
        return LabelledMaps(**vars(self.pictures().subset(index)), views=self.views, rows=self.rows[index])

    def joined(self, others: LabelledImages) -> LabelledMaps:
        assert isinstance(others, LabelledMaps)
        both = self.pictures().joined(others.pictures())
        return LabelledMaps(**vars(both), views=self.views, rows=np.concatenate([self.rows, others.rows]))

    def pictures(self) -> LabelledImages:
        """The images alone."""
        return LabelledImages(images=self.images, labels=self.labels, names=self.names)

    def to(self, device: torch.device) -> LabelledMaps:
        """The same: maps may exceed a device's memory, and are sent batch by batch."""
        return self

    def batches(
        self, indices: Sequence[Tensor], device: torch.device, augment: Augment | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Maps B×C×h×w in fp32 and labels; with `augment`, a view is drawn for each image."""
        for index_B in indices:
            rows_B = self.rows[index_B.numpy()]
            draws_B = np.zeros(len(rows_B), dtype=np.int64)
            if augment is not None and augment.config.flip:
                draws_B = torch.randint(len(self.views), (len(rows_B),), generator=augment.host).numpy()
            maps_BChw = np.stack([self.views[draw][row] for draw, row in zip(draws_B, rows_B, strict=True)])
            yield torch.from_numpy(maps_BChw).to(device).float(), self.labels[index_B].to(device, non_blocking=True)

    def pairs(self, indices: Sequence[Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """The maps of both views, B×C×h×w each in fp32."""
        plain, mirrored = self.views
        for index_B in indices:
            rows_B = self.rows[index_B.numpy()]
            yield tuple(torch.from_numpy(view[rows_B]).to(device).float() for view in (plain, mirrored))  # type: ignore[misc]


def pictures(part: Images) -> Images:
    """A part's images, without maps."""
    return part.pictures() if isinstance(part, LabelledMaps) else part


def cache_folder() -> Path:
    """The folder of cached maps: `camcal/features` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "camcal" / "features"


def with_maps(data: Dataset, network: LongTailClassifier, recipe: Recipe, console: Console) -> Dataset:
    """The same data with the maps of the network's trunk, for a recipe that freezes it; otherwise the data itself.

    The maps are read from `cache_folder` if the same trunk has processed the same images before, in whatever part.
    Another seed or another head then costs seconds.
    """
    if recipe.fit.mode != "frozen" or isinstance(data.train, LabelledMaps):
        return data
    parts = [data.train, data.holdout, data.test]
    digests = {id(part): _digests(part) for part in parts}
    trunk = _trunk_digest(network)
    plain, plain_rows = _maps(network, trunk, parts, digests, "plain", console)
    views, mirrored_rows = [plain], plain_rows
    judged_by_both = recipe.calibrate.views == "flip"
    if recipe.augment.flip or judged_by_both:
        seen = parts if judged_by_both else parts[:2]
        mirrored, mirrored_rows = _maps(network, trunk, seen, digests, "mirrored", console)
        # Both views list the training images first, in the same order, so one set of rows serves both.
        views = [plain, mirrored]
    assert all(plain_rows[digest] == row for digest, row in mirrored_rows.items())

    def mapped(part: Images, views: list[Maps]) -> LabelledMaps:
        assert isinstance(part, LabelledImages)
        rows = np.array([plain_rows[digest] for digest in digests[id(part)]], dtype=np.int64)
        return LabelledMaps(**vars(part), views=views, rows=rows)

    return replace(
        data,
        train=mapped(data.train, views),
        holdout=mapped(data.holdout, views),
        test=mapped(data.test, views if judged_by_both else [plain]),
    )


def _digests(part: Images) -> list[bytes]:
    """The digest of each image's pixels."""
    return [hashlib.sha256(image.numpy().data).digest() for image in part.images]


def _trunk_digest(network: LongTailClassifier) -> bytes:
    """Digest of everything that determines the trunk's maps of an image."""
    found = hashlib.sha256(
        f"{type(network.trunk).__qualname__} {torch.__version__} {network.mean.device.type}".encode()
    )
    found.update(str(network.trunk).encode())
    for tensor in (*network.trunk.state_dict().values(), network.mean, network.std):
        found.update(tensor.detach().cpu().contiguous().numpy().data)
    return found.digest()


def _maps(
    network: LongTailClassifier,
    trunk: bytes,
    parts: Sequence[Images],
    digests: dict[int, list[bytes]],
    view: View,
    console: Console,
) -> tuple[Maps, dict[bytes, int]]:
    """One view's maps of the images of all parts, and the row of each image by its digest.

    Rows are in the order of the digests of the first two parts, and then of the third.
    """
    taught = sorted({digest for part in parts[:2] for digest in digests[id(part)]})
    others = sorted({digest for part in parts[2:] for digest in digests[id(part)]} - set(taught))
    rows = {digest: row for row, digest in enumerate([*taught, *others])}
    key = hashlib.sha256(trunk + view.encode() + b"".join(rows)).hexdigest()[:32]
    path = cache_folder() / f"{key}.npy"
    if not path.is_file():
        places: dict[bytes, tuple[Images, int]] = {}
        for part in parts:
            for i, digest in enumerate(digests[id(part)]):
                places.setdefault(digest, (part, i))
        images = [places[digest] for digest in rows]
        began = time.perf_counter()
        _compute(network, images, view, path, console)
        console.print(
            f"features of {len(images)} images, {view}: {time.perf_counter() - began:.0f} s, "
            f"{path.stat().st_size / 1e6:.0f} MB cached in {path}"
        )
    return np.load(path, mmap_mode="r"), rows


@torch.inference_mode()
def _compute(
    network: LongTailClassifier, images: Sequence[tuple[Images, int]], view: View, path: Path, console: Console
) -> None:
    """Write the maps of images, in their order; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial")
    network.trunk.eval()
    kept: np.memmap[Any, np.dtype[np.float16]] | None = None
    try:
        starts = range(0, len(images), BATCH)
        for start in track(starts, f"features, {view}", console=console, transient=True):
            images_BHWC = torch.stack([part.images[i] for part, i in images[start : start + BATCH]])
            images_BHWC = images_BHWC.to(network.mean.device)
            maps_BChw = network.trunk_maps(images_BHWC if view == "plain" else images_BHWC.flip(2))
            if kept is None:
                shape = (len(images), *maps_BChw.shape[1:])
                kept = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
            kept[start : start + BATCH] = maps_BChw.cpu().numpy()
        if kept is not None:
            kept.flush()
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
