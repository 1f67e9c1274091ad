"""The data of one run: images and labels of three parts, as tensors."""

from __future__ import annotations

import hashlib
import itertools
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camcal.models.preprocessing import Preprocessing
from camcal.models.untrusted import illegible
from camcal.training.data.augment import Augment


class DataError(ValueError):
    """Images or labels that are missing, unreadable or do not fit together."""


class Images(Protocol):
    """N images and their labels: in memory (`LabelledImages`) or in files (`listed.ListedImages`)."""

    @property
    def labels(self) -> Tensor:
        """int64, N, on the CPU."""

    @property
    def images(self) -> Tensor:
        """All of them, uint8 N×S×S×3; only for small parts."""

    @property
    def names(self) -> list[str]:
        """File names, N; empty if the images are not from files of their own."""

    @property
    def side(self) -> int:
        """S, px."""

    def __len__(self) -> int: ...

    def subset(self, index: NDArray[np.int64]) -> Self:
        """The images at these positions, in this order."""

    def joined(self, others: Self) -> Self:
        """These and then the others."""

    def to(self, device: torch.device) -> Self:
        """The same, moved to a device if they are in memory."""

    def batches(
        self, indices: Sequence[Tensor], device: torch.device, augment: Augment | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """For each tensor of positions in turn, images and labels on the device.

        Images are uint8 B×S×S×3 and preprocessed as in serving, or floating point and augmented.
        """


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """N images in memory (uint8, N×S×S×3, RGB, on any device) and their labels (int64, N, on the CPU)."""

    images: Tensor
    labels: Tensor
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise DataError(f"{len(self.images)} images but {len(self.labels)} labels")

    @property
    def side(self) -> int:
        """S, px."""
        return self.images.shape[1]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: NDArray[np.int64]) -> LabelledImages:
        """The images at these positions, in this order."""
        chosen = torch.from_numpy(index)
        names = [self.names[i] for i in index] if self.names else []
        return LabelledImages(images=self.images[chosen], labels=self.labels[chosen], names=names)

    def joined(self, others: LabelledImages) -> LabelledImages:
        """These and then the others."""
        return LabelledImages(
            images=torch.cat([self.images, others.images]),
            labels=torch.cat([self.labels, others.labels]),
            names=self.names + others.names,
        )

    def to(self, device: torch.device) -> LabelledImages:
        """The same, with the images on a device."""
        return replace(self, images=self.images.to(device))

    def batches(
        self, indices: Sequence[Tensor], device: torch.device, augment: Augment | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Images.batches`. Positions are sent to the images' device, so that nothing waits for a GPU."""
        for index_B in indices:
            images_BHWC = self.images[index_B.to(self.images.device, non_blocking=True)].to(device, non_blocking=True)
            labels_B = self.labels[index_B].to(device, non_blocking=True)
            yield (augment(images_BHWC) if augment else images_BHWC), labels_B


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The images to train on (`train`), to fit scalar and temperature on (`holdout`), and to evaluate on (`test`).

    left_out: a sentence about files that were skipped; empty if there were none.
    """

    classes: list[str]
    preprocessing: Preprocessing
    train: Images
    holdout: Images
    test: Images
    left_out: str = ""

    def __post_init__(self) -> None:
        if twice := [name for name, count in Counter(self.classes).items() if count > 1 or not name.strip()]:
            raise DataError(f"two classes are named {twice[0]!r}" if twice[0].strip() else "a class has no name")
        if bad := next(filter(illegible, self.classes), None):  # bundles do not allow it
            raise DataError(f"the class name {ascii(bad)} holds the control character {illegible(bad)}; rename it")
        names = (name for part in (self.train, self.holdout, self.test) for name in part.names)
        for name in itertools.chain(self.classes, names):
            if not _is_text(name):
                raise DataError(f"the name {name!a} is not UTF-8: rename that file or folder")
        counts = self.train_counts()
        if empty := [name for name, count in zip(self.classes, counts, strict=True) if count == 0]:
            raise DataError(
                f"no training image of class {empty[0]!r}" + (f" and {len(empty) - 1} more" * (len(empty) > 1))
            )
        if not len(self.test):
            raise DataError("the test part has no images")

    def whole(self) -> Dataset:
        """The same data with all images for training, and none held out."""
        nothing = np.empty(0, dtype=np.int64)
        return replace(self, train=self.train.joined(self.holdout), holdout=self.holdout.subset(nothing))

    @cached_property
    def digest(self) -> str:
        """Digest of labels and names of the training and held-out images, in their order."""
        found = hashlib.sha256()
        for part in (self.train, self.holdout):
            found.update("\n".join(part.names).encode() + part.labels.numpy().tobytes())
        return found.hexdigest()[:16]

    @cached_property
    def pixels(self) -> str:
        """Digest of every fourth pixel of images without file names, which `digest` cannot tell apart."""
        found = hashlib.sha256()
        for part in (self.train, self.holdout):
            if isinstance(part, LabelledImages) and not part.names:
                found.update(part.images[:, ::4, ::4].contiguous().cpu().numpy().data)
        return found.hexdigest()[:16]

    def train_counts(self) -> NDArray[np.int64]:
        """Training images per class, held-out ones included. K values."""
        labels = torch.cat([self.train.labels, self.holdout.labels]).numpy()
        return np.bincount(labels, minlength=len(self.classes))


def _is_text(name: str) -> bool:
    """Whether a name can be encoded; file systems allow any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def path_below(name: str) -> str | None:
    """A relative path, normalised; None if it leads out of its folder."""
    shortest = posixpath.normpath(name)
    return None if shortest.partition("/")[0] in ("", "..") else shortest


def long_tail_counts(largest: int, classes: int, imbalance: float) -> NDArray[np.int64]:
    """The exponential profile n_k = int(n_max·μ^(k/(K-1))), μ = 1/imbalance (LDAM, arXiv 1906.07413)."""
    exponents = np.arange(classes) / (classes - 1)
    return (largest * (1 / imbalance) ** exponents).astype(np.int64)


def first_of_each(labels: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The positions of the first n_k samples of each class k, in their original order.

    Raises:
        DataError: if a class has fewer samples than asked for.
    """
    chosen = []
    for label, count in enumerate(counts):
        where = np.flatnonzero(labels == label)
        if len(where) < count:
            raise DataError(f"class {label} has {len(where)} training images; this imbalance needs {count}")
        chosen.append(where[:count])
    return np.sort(np.concatenate(chosen))


def split_each(labels: NDArray[np.int64], fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split positions into (rest, part), where the part has `fraction` of each class, drawn with the seed.

    A class with two or more samples gives at least one to the part; a class with one gives none.
    """
    rng = np.random.default_rng(seed)
    part = []
    for label in np.unique(labels):
        where = rng.permutation(np.flatnonzero(labels == label))
        part.append(where[: min(len(where) - 1, max(1, round(fraction * len(where))))])
    chosen = np.sort(np.concatenate(part))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen
