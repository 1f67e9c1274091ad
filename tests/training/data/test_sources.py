from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.data.test_cifar import _packed
from training.config import DataConfig
from training.data import DataError, load_dataset


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


def test_cifar_is_cut_to_its_profile(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(10), 500)
    images = np.zeros((5000, 32, 32, 3), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = labels, np.tile(np.arange(500) // 2, 10)
    packed = _packed(tmp_path / "c.npz", train_images=images, train_labels=labels)
    with pytest.raises(DataError, match="class 0 has 500 training images; this imbalance needs 5000"):
        load_dataset(DataConfig(source="cifar10", root=packed), seed=0)


def test_a_folder_without_a_test_part_gets_one(tmp_path: Path) -> None:
    for name, count in (("cat", 20), ("dog", 5)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (40, 40), (10 * i, 0, 0)).save(tmp_path / name / f"{i}.png")
    data = load_dataset(DataConfig(source="folder", root=tmp_path, test_fraction=0.2), seed=0)
    assert torch.bincount(data.test.labels).tolist() == [4, 1]
    assert data.train_counts().tolist() == [16, 4]
    assert data.classes == ["cat", "dog"]
