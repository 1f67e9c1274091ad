"""Photographs in folders: `train/CLASS/*.jpg` (and `test/CLASS/…`), `CLASS/*.jpg`, or one folder and a split file."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from camcal.cpus import usable_cpus
from camcal.models.pictures import read_file
from camcal.models.preprocessing import Preprocessing
from camcal.training.data.dataset import DataError, path_below

SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif"}
TRAIN = ("train", "training")  # names of a part's folder, in any case
TEST = ("test", "testing", "val", "valid", "validation")

Samples = list[tuple[Path, int]]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Class names, and (path, label) of every image; `test` is empty where the folder has no such part.

    left_out: a sentence about files and folders that were skipped; empty if there were none.
    """

    classes: list[str]
    train: Samples
    test: Samples
    left_out: str = ""


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
    train = _part(root, TRAIN) or root
    test = _part(root, TEST) if train != root else None
    classes = _class_folders(train)
    if train == root and classes and all(name.lower() in TRAIN + TEST for name in classes):
        raise DataError(
            f"{root} has {' and '.join(classes)}, but none of them is a train folder with one folder per class"
        )
    if train == root and (part := next(filter(lambda name: _is_part(root, name, classes), classes), None)):
        raise DataError(
            f"{root} has class folders beside {part}, which holds folders of the same names: move the former into "
            f"{root / 'train'}"
        )
    if len(classes) < 2:
        raise DataError(
            f"{train} has {len(classes)} folders with images; expected one per class, for two classes or more"
        )
    if test is None:
        return Listing(classes=classes, train=_from_folders(train, classes), test=[], left_out=_left_out(train))
    if unknown := set(_class_folders(test)) - set(classes):
        raise DataError(f"{test} has the class {sorted(unknown)[0]!r}, which {train} does not have")
    return Listing(
        classes=classes,
        train=_from_folders(train, classes),
        test=_from_folders(test, classes),
        left_out=_left_out(train, test),
    )


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
            images[index] = read_file(path).pixels(preprocessing)
        except (OSError, ValueError) as error:
            return f"{path}: {error}"
        return None

    with ThreadPoolExecutor(usable_cpus()) as pool:
        bad = [problem for problem in pool.map(read, range(len(samples))) if problem]
    if bad:
        raise DataError(f"{len(bad)} of {len(samples)} images cannot be read; the first: {bad[0]}")
    return images, np.array([label for _, label in samples], dtype=np.int64)


def _part(root: Path, names: Sequence[str]) -> Path | None:
    """The folder of a part. It must have class folders itself: a class may be called train."""
    found = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    return next((found[name] for name in names if name in found and _class_folders(found[name])), None)


def _is_part(root: Path, name: str, classes: Sequence[str]) -> bool:
    """Whether a folder among the classes is really a part of the data, with folders of the same classes."""
    return name.lower() in TRAIN + TEST and not {*classes}.isdisjoint(_class_folders(root / name))


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, except hidden ones and what macOS adds to archives."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return (path for path in found if not any(map(_is_hidden, path.relative_to(folder).parts)))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _has_images(folder: Path) -> bool:
    return any(map(_is_image, _files(folder)))


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not _is_hidden(path.name))


def _class_folders(root: Path) -> list[str]:
    return [path.name for path in _folders(root) if _has_images(path)]


def _left_out(*parts: Path) -> str:
    files = [path for part in parts for path in _files(part) if not _is_image(path)]
    empty = [path.name for part in parts for path in _folders(part) if not _has_images(path)]
    words = []
    if files:
        kinds = Counter(path.suffix.lower() or "no suffix" for path in files)
        shown = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
        words.append(f"files that are not {', '.join(sorted(SUFFIXES))} were skipped: {shown}")
    if empty:
        shown = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        words.append(f"folders without images were skipped: {shown}")
    return "; ".join(words)


def _from_folders(root: Path, classes: list[str]) -> Samples:
    return [
        (path, label) for label, name in enumerate(classes) for path in sorted(filter(_is_image, _files(root / name)))
    ]


def _rows(path: Path, columns: set[str]) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := columns - set(reader.fieldnames or ()):
                raise DataError(f"{path} has no column {sorted(missing)[0]!r}; it needs {', '.join(sorted(columns))}")
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    for line, row in enumerate(rows, start=2):
        if short := [column for column in sorted(columns) if row[column] is None]:
            raise DataError(f"{path}, line {line}: no {short[0]}; it needs {', '.join(sorted(columns))}")
    return rows


def _from_split(root: Path, path: Path) -> Listing:
    rows = _rows(path, {"path", "split", "label"})
    names_file = path.parent / "classes.csv"
    if names_file.is_file():
        table = {row["label"]: row["name"] for row in _rows(names_file, {"label", "name"})}
        classes = list(table.values())
        index = {key: i for i, key in enumerate(table)}
        for i, name in enumerate(classes):
            if index.setdefault(name, i) != i:
                raise DataError(f"{names_file}: {name!r} is the label of one class and the name of another")
    else:
        classes = sorted({row["label"] for row in rows})
        index = {name: i for i, name in enumerate(classes)}
    parts: dict[str, Samples] = {"train": [], "test": []}
    for line, row in enumerate(rows, start=2):
        if row["split"] not in parts:
            raise DataError(f"{path}, line {line}: split is {row['split']!r}; expected train or test")
        if row["label"] not in index:
            raise DataError(f"{path}, line {line}: label {row['label']!r} is not in {names_file.name}")
        if (below := path_below(row["path"])) is None:
            raise DataError(f"{path}, line {line}: {row['path']!r} is outside of {root}: paths must stay below it")
        parts[row["split"]].append((root / below, index[row["label"]]))
    if not parts["train"]:
        raise DataError(f"{path} has no row of the split train")
    return Listing(classes=classes, train=parts["train"], test=parts["test"])
