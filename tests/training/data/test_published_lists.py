"""The published list files, where CAMCAL_LISTS names a folder that has them."""

import csv
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from camcal.models.bundle import GROUPS, group_of
from camcal.training.data.listed import read_list

FOLDER = os.environ.get("CAMCAL_LISTS", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="CAMCAL_LISTS names no folder of published lists")

IMAGENET = (115846, 1000, 1280, 5, (385, 479, 136))
PLACES = (62500, 365, 4980, 5, (131, 163, 71))
INATURALIST = (437513, 8142, 1000, 2, (842, 4076, 3224))


def _present(name: str) -> Path:
    path = Path(FOLDER) / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path


def _figures(counts: list[int]) -> tuple[int, int, int, int, tuple[int, ...]]:
    """Images, classes, largest and smallest class, and how many classes of each group."""
    groups = Counter(group_of(count) for count in counts)
    return sum(counts), len(counts), max(counts), min(counts), tuple(groups[group] for group in GROUPS)


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("ImageNet_LT_train.txt", IMAGENET),
        ("Places_LT_train.txt", PLACES),
        ("Places_LT_train.data_256_paths.txt", PLACES),
        ("iNaturalist18_train.txt", INATURALIST),
    ],
)
def test_a_training_list_has_the_published_tail(name: str, figures: tuple[object, ...]) -> None:
    names, labels = read_list(_present(name))
    assert _figures(np.bincount(labels).tolist()) == figures
    assert len(set(names)) == len(names)


def test_the_class_counts_of_imagenet_lt_are_the_published_ones() -> None:
    with _present("ImageNet_LT_train_class_counts.csv").open(newline="", encoding="utf-8") as file:
        counts = [int(row["n_train"]) for row in csv.DictReader(file)]
    assert _figures(counts) == IMAGENET


@pytest.mark.parametrize(
    ("name", "classes", "each"),
    [("ImageNet_LT_test.txt", 1000, 50), ("Places_LT_test.txt", 365, 100), ("iNaturalist18_val.txt", 8142, 3)],
)
def test_a_test_list_is_balanced(name: str, classes: int, each: int) -> None:
    _, labels = read_list(_present(name))
    assert np.bincount(labels).tolist() == [each] * classes
