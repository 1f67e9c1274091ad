from dataclasses import replace

import numpy as np
import pytest
import torch

from camcal.models.preprocessing import Preprocessing
from camcal.training.data.dataset import DataError, Dataset, LabelledImages, first_of_each, long_tail_counts, split_each


def test_the_profile_of_cifar10_lt_at_100_is_the_published_one() -> None:
    assert long_tail_counts(5000, 10, 100).tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


@pytest.mark.parametrize(
    ("largest", "classes", "imbalance", "total"),
    [
        *[(5000, 10, i, n) for i, n in ((10, 20431), (50, 13996), (100, 12406), (200, 11203))],
        *[(500, 100, i, n) for i, n in ((10, 19573), (50, 12608), (100, 10847), (200, 9502))],
    ],
)
def test_totals_are_the_published_ones(largest: int, classes: int, imbalance: float, total: int) -> None:
    assert long_tail_counts(largest, classes, imbalance).sum() == total


def test_first_of_each_keeps_the_order() -> None:
    labels = np.array([1, 0, 1, 0, 0, 1])
    assert first_of_each(labels, np.array([2, 1])).tolist() == [0, 1, 3]


def test_a_class_that_is_too_small_is_named() -> None:
    with pytest.raises(DataError, match="class 1 has 1 training images; this imbalance needs 2"):
        first_of_each(np.array([0, 0, 1]), np.array([2, 2]))


def test_split_takes_a_share_of_each_class_and_at_least_one() -> None:
    labels = np.repeat([0, 1, 2, 3], [100, 10, 2, 1])
    rest, part = split_each(labels, 0.1, seed=0)
    assert np.bincount(labels[part], minlength=4).tolist() == [10, 1, 1, 0]
    assert sorted([*rest, *part]) == list(range(113))
    assert np.array_equal(part, split_each(labels, 0.1, seed=0)[1])
    assert not np.array_equal(part, split_each(labels, 0.1, seed=1)[1])


def _part(*labels: int) -> LabelledImages:
    return LabelledImages(images=torch.zeros(len(labels), 8, 8, 3, dtype=torch.uint8), labels=torch.tensor(labels))


def _dataset(train: LabelledImages, test: LabelledImages) -> Dataset:
    rule = Preprocessing(fit="crop", resize=8, input_size=8, mean=(0, 0, 0), std=(1, 1, 1))
    return Dataset(classes=["a", "b"], preprocessing=rule, train=train, holdout=_part(0), test=test)


def test_train_counts_include_the_held_out_images() -> None:
    assert _dataset(_part(0, 0, 1), _part(1)).train_counts().tolist() == [3, 1]


def test_a_class_without_training_images_is_named() -> None:
    with pytest.raises(DataError, match="no training image of class 'b'"):
        _dataset(_part(0), _part(1))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "a"], "two classes are named 'a'"),
        (["a", " "], "has no name"),
        (["a", "b\x1b[0m"], "holds the control character U\\+001B"),
    ],
)
def test_classes_have_names_of_their_own(names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(_dataset(_part(0, 1), _part(1)), classes=names)


def test_an_empty_test_part_is_refused() -> None:
    empty = LabelledImages(images=torch.zeros(0, 8, 8, 3), labels=torch.zeros(0, dtype=torch.int64))
    with pytest.raises(DataError, match="the test part has no images"):
        _dataset(_part(0, 1), empty)


def test_images_without_labels_are_refused() -> None:
    with pytest.raises(DataError, match="2 images but 1 labels"):
        LabelledImages(images=torch.zeros(2, 8, 8, 3), labels=torch.zeros(1, dtype=torch.int64))
