"""The data of one run: images and labels of three parts, as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.preprocessing import Preprocessing


class DataError(ValueError):
    """Images or labels that are missing, unreadable or do not fit together."""


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """N images (uint8, N×S×S×3, RGB) and their labels (int64, N)."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise DataError(f"{len(self.images)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: NDArray[np.int64]) -> LabelledImages:
        """The images at these positions, in this order."""
        chosen = torch.from_numpy(index)
        return LabelledImages(images=self.images[chosen], labels=self.labels[chosen])


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What a run trains on (`train`), fits scalar and temperature on (`holdout`), and is judged by (`test`)."""

    classes: list[str]
    preprocessing: Preprocessing
    train: LabelledImages
    holdout: LabelledImages
    test: LabelledImages

    def __post_init__(self) -> None:
        counts = self.train_counts()
        if empty := [name for name, count in zip(self.classes, counts, strict=True) if count == 0]:
            raise DataError(
                f"no training image of class {empty[0]!r}" + (f" and {len(empty) - 1} more" * (len(empty) > 1))
            )
        if not len(self.test):
            raise DataError("the test part has no images")

    def train_counts(self) -> NDArray[np.int64]:
        """Training images per class, the held-out ones included: what the long tail of the data is. K values."""
        labels = torch.cat([self.train.labels, self.holdout.labels]).numpy()
        return np.bincount(labels, minlength=len(self.classes))


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
    """Divide positions into (rest, part), the part taking `fraction` of each class, at random but repeatable.

    A class with at least two samples gives at least one to the part; with one, none.
    """
    rng = np.random.default_rng(seed)
    part = []
    for label in np.unique(labels):
        where = rng.permutation(np.flatnonzero(labels == label))
        part.append(where[: min(len(where) - 1, max(1, round(fraction * len(where))))])
    chosen = np.sort(np.concatenate(part))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen
