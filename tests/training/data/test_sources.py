import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from camcal.training.data import DataError, Dataset, LabelledImages, load_dataset
from camcal.training.recipe import DataConfig, load_recipe
from tests.training.data.test_cifar import _dump, _packed, _planes


def test_digits_have_a_long_tail_and_a_balanced_test() -> None:
    data = load_dataset(DataConfig(source="digits", imbalance=10, holdout_fraction=0.2), seed=0)
    counts = data.train_counts().tolist()
    assert counts[0] == 130 and counts[-1] == 13 and counts == sorted(counts, reverse=True)
    assert torch.bincount(data.test.labels).tolist() == [40] * 10
    assert data.train.images.shape[1:] == (32, 32, 3) and data.train.images.dtype == torch.uint8
    assert torch.bincount(data.holdout.labels)[0] == 26


def test_no_image_is_in_two_parts() -> None:
    data = load_dataset(DataConfig(source="digits", imbalance=10), seed=3)
    parts = [{row.tobytes() for row in part.images.numpy()} for part in (data.train, data.holdout, data.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_digits_have_one_size() -> None:
    with pytest.raises(DataError, match="digits images are 32×32: set data.resize and data.input_size to 32"):
        load_dataset(DataConfig(source="digits", resize=64, input_size=64), seed=0)


def _numbered(count: int) -> NDArray[np.uint8]:
    """Noise, each image's own number in its first two bytes."""
    images = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.divmod(np.arange(count), 256)
    return images


def _counts_at_100(largest: int, classes: int) -> list[int]:
    return [int(largest * 0.01 ** (k / (classes - 1))) for k in range(classes)]


def _shuffled_labels(counts: list[int]) -> NDArray[np.int64]:
    """Two more of each class than counted."""
    return np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), np.array(counts) + 2))


def _trained_on(data: Dataset) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images and labels of the training part, the held-out ones included, by the images' numbers."""
    images = torch.cat([data.train.images, data.holdout.images]).numpy()
    labels = torch.cat([data.train.labels, data.holdout.labels]).numpy()
    order = np.argsort(images[:, 0, 0, 0].astype(int) * 256 + images[:, 0, 0, 1])
    return images[order], labels[order]


@pytest.mark.parametrize(
    ("recipe", "largest", "classes", "total"), [("cifar10-lt", 5000, 10, 12406), ("cifar100-lt", 500, 100, 10847)]
)
def test_packed_cifar_is_cut_to_the_first_images_of_each_class(
    recipe: str, largest: int, classes: int, total: int, tmp_path: Path
) -> None:
    counts = _counts_at_100(largest, classes)
    labels = _shuffled_labels(counts)
    images, test_images, test_labels = _numbered(len(labels)), _numbered(300), np.arange(300)[::-1] % classes
    packed = _packed(
        tmp_path / "c.npz",
        train_images=images,
        train_labels=labels,
        test_images=test_images,
        test_labels=test_labels,
        class_names=np.array([f"class {k}" for k in range(classes)]),
    )
    data = load_dataset(load_recipe(recipe, [f"data.root={packed}"]).data, seed=5)

    kept = np.sort(np.concatenate([np.flatnonzero(labels == k)[:n] for k, n in enumerate(counts)]))
    found, found_labels = _trained_on(data)
    assert data.train_counts().tolist() == counts and len(found) == total
    assert np.array_equal(found, images[kept]) and np.array_equal(found_labels, labels[kept])
    assert np.array_equal(data.test.images.numpy(), test_images)
    assert np.array_equal(data.test.labels.numpy(), test_labels)


def test_torchvision_s_cifar_is_shuffled_once_and_then_cut(tmp_path: Path) -> None:
    counts = _counts_at_100(500, 100)
    labels = _shuffled_labels(counts)
    images, test_images, test_labels = _numbered(len(labels)), _numbered(300), np.arange(300)[::-1] % 100
    _dump(tmp_path / "train", {"data": _planes(images), "fine_labels": labels.tolist()})
    _dump(tmp_path / "test", {"data": _planes(test_images), "fine_labels": test_labels.tolist()})
    _dump(tmp_path / "meta", {"fine_label_names": [f"class {k}" for k in range(100)]})
    data = load_dataset(load_recipe("cifar100-lt", [f"data.root={tmp_path}"]).data, seed=5)

    random = np.random.RandomState(0)
    kept: list[int] = []
    for k, n in enumerate(counts):
        of_class = [i for i, label in enumerate(labels) if label == k]
        random.shuffle(of_class)
        kept += of_class[:n]
    kept.sort()
    found, found_labels = _trained_on(data)
    assert data.train_counts().tolist() == counts
    assert np.array_equal(found, images[kept]) and np.array_equal(found_labels, labels[kept])
    assert np.array_equal(data.test.images.numpy(), test_images)
    assert np.array_equal(data.test.labels.numpy(), test_labels)


def test_too_few_cifar_images_for_the_profile_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="class 0 has 2 training images; this imbalance needs 5000"):
        load_dataset(DataConfig(source="cifar10", root=_packed(tmp_path / "c.npz")), seed=0)


def test_a_folder_with_nothing_to_hold_out_is_refused(tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(2):
            Image.new("RGB", (32, 32)).save(tmp_path / label / f"{number}.png")
    with pytest.raises(DataError, match="no class has two training images, so none can be held out"):
        load_dataset(DataConfig(source="folder", root=tmp_path), 0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["0.png,train,cat"], "0.png is listed 2 times as a training image: list each once"),
        (["x/.././0.png,train,cat"], "0.png is listed 2 times as a training image"),
        (["5.png,test,dog", "./4.png,test,cat"], "2 images are listed for both training and test, the first 4.png"),
    ],
)
def test_an_image_named_twice_is_refused(tmp_path: Path, more: list[str], message: str) -> None:
    rows = [f"{i}.png,{'train' if i < 8 else 'test'},{'cat' if i % 2 == 0 else 'dog'}" for i in range(10)]
    for i in range(10):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "s.csv").write_text("\n".join(["path,split,label", *rows, *more]))
    config = DataConfig(source="folder", root=tmp_path, split_file="s.csv", resize=8, input_size=8)
    with pytest.raises(DataError, match=message):
        load_dataset(config, seed=0)


def test_other_pixels_without_names_are_other_data() -> None:
    data = load_dataset(DataConfig(source="digits", imbalance=10), seed=0)
    assert isinstance(data.train, LabelledImages)

    def with_train(images: torch.Tensor, names: list[str]) -> Dataset:
        labels = data.train.labels
        return replace(data, train=LabelledImages(images=images, labels=labels, names=names))

    pixels, names = data.train.images, ["x"] * len(data.train)
    assert with_train(255 - pixels, []).digest == data.digest
    assert with_train(255 - pixels, []).pixels != data.pixels == with_train(pixels, []).pixels
    # Files are known by their names; what a decoder makes of them may differ by a little.
    assert with_train(255 - pixels, names).pixels == with_train(pixels, names).pixels


def test_a_file_more_or_less_is_other_data(tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(9):
            Image.new("RGB", (32, 32)).save(tmp_path / label / f"{number}.png")
    config = DataConfig(source="folder", root=tmp_path)
    before = load_dataset(config, 0)
    assert load_dataset(config, 0).digest == before.digest
    trained_on = tmp_path / before.train.names[0]
    trained_on.rename(trained_on.with_stem("another"))  # the counts stay as they are
    assert load_dataset(config, 0).digest != before.digest


def test_a_folder_without_a_test_part_gets_one(tmp_path: Path) -> None:
    for name, count in (("cat", 20), ("dog", 5)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (40, 40), (10 * i, 0, 0)).save(tmp_path / name / f"{i}.png")
    data = load_dataset(DataConfig(source="folder", root=tmp_path, test_fraction=0.2), seed=0)
    assert torch.bincount(data.test.labels).tolist() == [4, 1]
    assert data.train_counts().tolist() == [16, 4]
    assert data.classes == ["cat", "dog"]


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems have no such names")
def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(9):
            Image.new("RGB", (32, 32)).save(tmp_path / label / f"{number}.png")
    os.rename(tmp_path / "a/0.png", os.fsencode(tmp_path) + b"/a/caf\xe9.png")
    with pytest.raises(DataError, match=r"the name 'a/caf\\udce9.png' is not UTF-8: rename that file or folder"):
        load_dataset(DataConfig(source="folder", root=tmp_path), 0)
