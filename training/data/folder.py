"""Photographs in folders: `train/CLASS/*.jpg` (and `test/CLASS/…`), `CLASS/*.jpg`, or one folder and a split file."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.preprocessing import Preprocessing, upright
from service.cpus import usable_cpus
from training.data.dataset import DataError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}

Samples = list[tuple[Path, int]]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Class names, and (path, label) of every image; `test` is empty where the folder has no such part."""

    classes: list[str]
    train: Samples
    test: Samples


def list_images(root: Path, split_file: str | None = None) -> Listing:
    """Find the images under `root`.

    Args:
        root: the folder.
        split_file: a CSV under root with the columns path, split (`train` or `test`) and label. Labels are class
            names, or indices into a `classes.csv` beside it with the columns label and name.

    Raises:
        DataError: naming the folder, file or row that does not fit.
    """
    if not root.is_dir():
        raise DataError(f"no folder at {root}")
    if split_file is not None:
        return _from_split(root, root / split_file)
    train = root / "train" if (root / "train").is_dir() else root
    tests = [root / name for name in ("test", "val") if (root / name).is_dir() and train != root]
    classes = _class_folders(train)
    if len(classes) < 2:
        raise DataError(
            f"{train} has {len(classes)} folders with images; expected one for each of at least two classes"
        )
    test: Samples = []
    if tests:
        if unknown := set(_class_folders(tests[0])) - set(classes):
            raise DataError(f"{tests[0]} has the class {sorted(unknown)[0]!r}, which {train} does not have")
        test = _from_folders(tests[0], classes)
    return Listing(classes=classes, train=_from_folders(train, classes), test=test)


def decode(samples: Samples, preprocessing: Preprocessing) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read and preprocess all images: uint8 N×S×S×3 and labels N.

    Raises:
        DataError: naming the files that cannot be read.
    """
    size = preprocessing.input_size
    images = np.empty((len(samples), size, size, 3), dtype=np.uint8)

    def read(index: int) -> str | None:
        path = samples[index][0]
        try:
            with Image.open(path) as image:
                images[index] = preprocessing.apply(upright(image))
        except Exception as error:  # damaged files make Pillow raise nearly anything
            return f"{path}: {error}"
        return None

    with ThreadPoolExecutor(usable_cpus()) as pool:
        bad = [problem for problem in pool.map(read, range(len(samples))) if problem]
    if bad:
        raise DataError(f"{len(bad)} of {len(samples)} images cannot be read; the first: {bad[0]}")
    return images, np.array([label for _, label in samples], dtype=np.int64)


def _images(folder: Path) -> Iterable[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def _class_folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".") and any(_images(p)))


def _from_folders(root: Path, classes: list[str]) -> Samples:
    return [(path, label) for label, name in enumerate(classes) for path in _images(root / name)]


def _rows(path: Path, columns: set[str]) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := columns - set(reader.fieldnames or ()):
                raise DataError(f"{path} has no column {sorted(missing)[0]!r}; it needs {', '.join(sorted(columns))}")
            return list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _from_split(root: Path, path: Path) -> Listing:
    rows = _rows(path, {"path", "split", "label"})
    names_file = path.parent / "classes.csv"
    if names_file.is_file():
        table = {row["label"]: row["name"] for row in _rows(names_file, {"label", "name"})}
        classes = list(table.values())
        index = {key: i for i, key in enumerate(table)} | {name: i for i, name in enumerate(classes)}
    else:
        classes = sorted({row["label"] for row in rows})
        index = {name: i for i, name in enumerate(classes)}
    parts: dict[str, Samples] = {"train": [], "test": []}
    for line, row in enumerate(rows, start=2):
        if row["split"] not in parts:
            raise DataError(f"{path}, line {line}: split is {row['split']!r}; expected train or test")
        if row["label"] not in index:
            raise DataError(f"{path}, line {line}: label {row['label']!r} is not in {names_file.name}")
        parts[row["split"]].append((root / row["path"], index[row["label"]]))
    return Listing(classes=classes, train=parts["train"], test=parts["test"])
