"""From a recipe's data section to a `Dataset`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from camcal.models.preprocessing import Preprocessing
from camcal.training.data import cifar, folder, listed
from camcal.training.data.dataset import (
    DataError,
    Dataset,
    Images,
    LabelledImages,
    first_of_each,
    long_tail_counts,
    split_each,
)
from camcal.training.recipe import DataConfig

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images, N×H×W×3, and labels, N."""


def preprocessing_of(config: DataConfig) -> Preprocessing:
    """The preprocessing that a bundle keeps."""
    return Preprocessing(**config.model_dump(include=set(Preprocessing.model_fields)))


def load_dataset(config: DataConfig, seed: int) -> Dataset:
    """Load the images, cut balanced sources to a long tail, and hold out a part.

    Raises:
        DataError: if files are missing, unreadable or do not fit the recipe.
    """
    load = {"digits": _digits, "cifar10": _cifar, "cifar100": _cifar, "folder": _folder, "list": _list}[config.source]
    classes, train, test, left_out = load(config, seed)
    _check_apart(train, test)
    labels = train.labels.numpy()
    rest, held = split_each(labels, config.holdout_fraction, seed)
    if not len(held):
        raise DataError("no class has two training images, so none can be held out for scalar and temperature")
    return Dataset(
        classes=classes,
        preprocessing=preprocessing_of(config),
        train=train.subset(rest),
        holdout=train.subset(held),
        test=test,
        left_out=left_out,
    )


def _check_apart(train: Images, test: Images) -> None:
    """Raises DataError if an image is listed twice: the test or held-out part could have a copy of a training image."""
    names, test_names = (part.names for part in (train, test))
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(
            f"{twice[0]} is listed {names.count(twice[0])} times as a training image: list each once, or a copy of a "
            "training image would be held out (fit.sampler shows rare classes more often)"
        )
    if both := set(names) & set(test_names):
        raise DataError(f"{len(both)} images are listed for both training and test, the first {min(both)}")


class Loaded(NamedTuple):
    """A source's data, before a part of the training images is held out. left_out: as in `Dataset`."""

    classes: list[str]
    train: Images
    test: Images
    left_out: str = ""


def _tensors(arrays: Arrays, names: Sequence[str] = ()) -> LabelledImages:
    images, labels = arrays
    return LabelledImages(
        images=torch.from_numpy(images), labels=torch.from_numpy(labels.astype(np.int64)), names=list(names)
    )


def _square(config: DataConfig, size: int) -> None:
    if config.input_size != size or config.resize != size:
        raise DataError(f"{config.source} images are {size}×{size}: set data.resize and data.input_size to {size}")


def _digits(config: DataConfig, seed: int) -> Loaded:
    """scikit-learn's 1,797 handwritten digits of 8×8, enlarged four times; 40 of each class are the test part."""
    from sklearn.datasets import load_digits

    _square(config, 32)
    data = load_digits()
    grey = (np.kron(data.images, np.ones((1, 4, 4))) * (255 / 16)).round().astype(np.uint8)
    images, labels = np.repeat(grey[..., None], 3, axis=3), data.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(labels))
    images, labels = images[order], labels[order]
    test = first_of_each(labels, np.full(10, 40))
    rest = np.setdiff1d(np.arange(len(labels)), test)
    train = rest[first_of_each(labels[rest], long_tail_counts(130, 10, config.imbalance))]
    names = "zero one two three four five six seven eight nine".split()
    return Loaded(names, _tensors((images[train], labels[train])), _tensors((images[test], labels[test])))


def _cifar(config: DataConfig, seed: int) -> Loaded:
    _square(config, 32)
    assert config.root is not None
    classes, train, test = cifar.load(config.root, config.source)
    counts = long_tail_counts(5000 if config.source == "cifar10" else 500, len(classes), config.imbalance)
    chosen = first_of_each(train[1], counts)
    return Loaded(classes, _tensors((train[0][chosen], train[1][chosen])), _tensors(test))


def _folder(config: DataConfig, seed: int) -> Loaded:
    assert config.root is not None
    root = config.root
    listing = folder.list_images(config.root, config.split_file)
    if not listing.test:
        rest, part = split_each(np.array([label for _, label in listing.train]), config.test_fraction, seed)
        listing = replace(listing, train=[listing.train[i] for i in rest], test=[listing.train[i] for i in part])

    def read(part: folder.Samples) -> LabelledImages:
        names = [path.relative_to(root).as_posix() for path, _ in part]
        return _tensors(folder.decode(part, preprocessing_of(config)), names)

    return Loaded(listing.classes, read(listing.train), read(listing.test), listing.left_out)


def _list(config: DataConfig, seed: int) -> Loaded:
    assert config.root is not None and config.train_list is not None and config.test_list is not None
    return Loaded(*listed.load(config.root, config.train_list, config.test_list, preprocessing_of(config)))
