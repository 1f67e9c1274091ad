import io
import lzma
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from camcal.training.data import cifar
from camcal.training.data.dataset import DataError


def _pixels(count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def _packed(path: Path, **changes: Any) -> Path:
    arrays: dict[str, Any] = {
        "train_images": _pixels(20),
        "train_labels": np.arange(20) % 10,
        "test_images": _pixels(10),
        "test_labels": np.arange(10),
        "class_names": np.array([f"class {i}" for i in range(10)]),
    }
    buffer = io.BytesIO()
    kept: dict[str, Any] = {name: value for name, value in (arrays | changes).items() if value is not None}
    np.savez(buffer, **kept)
    path.write_bytes(lzma.compress(buffer.getvalue()) if path.suffix == ".xz" else buffer.getvalue())
    return path


@pytest.mark.parametrize("name", ["c.npz", "c.npz.xz"])
def test_packed_arrays(tmp_path: Path, name: str) -> None:
    classes, (images, labels), test = cifar.load(_packed(tmp_path / name), "cifar10")
    assert classes[3] == "class 3"
    assert np.array_equal(images, _pixels(20)) and labels.tolist() == list(range(10)) * 2
    assert len(test[0]) == len(test[1]) == 10


def _planes(images: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


def test_torchvision_folder_of_cifar10_in_selection_order(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images, labels = _pixels(50), np.random.default_rng(1).permutation(np.arange(50) % 10)
    for i in range(5):
        part = slice(10 * i, 10 * i + 10)
        _dump(folder / f"data_batch_{i + 1}", {"data": _planes(images[part]), "labels": labels[part].tolist()})
    _dump(folder / "test_batch", {"data": _planes(images[:10]), "labels": labels[:10].tolist()})
    _dump(folder / "batches.meta", {"label_names": [f"n{i}" for i in range(10)]})
    classes, (found, found_labels), test = cifar.load(tmp_path, "cifar10")

    random = np.random.RandomState(0)
    order = []
    for k in range(10):
        index = [i for i in range(50) if labels[i] == k]
        random.shuffle(index)
        order += index
    assert classes[9] == "n9"
    assert np.array_equal(found, images[order]) and np.array_equal(found_labels, labels[order])
    assert np.array_equal(test[0], images[:10])


def test_torchvision_folder_of_cifar100(tmp_path: Path) -> None:
    images, labels = _pixels(100), list(range(100))
    for name in ("train", "test"):
        _dump(tmp_path / name, {"data": _planes(images), "fine_labels": labels})
    _dump(tmp_path / "meta", {"fine_label_names": [f"n{i}" for i in range(100)]})
    classes, (found, _), _ = cifar.load(tmp_path, "cifar100")
    assert len(classes) == 100 and np.array_equal(found, images)


def test_a_pickle_with_anything_but_arrays_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return print, ("never",)

    (tmp_path / "train").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(DataError, match="is not a CIFAR batch: .*print is not allowed"):
        cifar.load(tmp_path, "cifar100")


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x02K\x01."])
def test_a_damaged_batch_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train").write_bytes(content)
    with pytest.raises(DataError, match="train is not a CIFAR batch"):
        cifar.load(tmp_path, "cifar100")


def test_a_batch_without_labels_is_named(tmp_path: Path) -> None:
    _dump(tmp_path / "train", {"data": _planes(_pixels(2)), "labels": [0, 1]})
    with pytest.raises(DataError, match="train is not a CIFAR batch: it has no 'fine_labels'"):
        cifar.load(tmp_path, "cifar100")


def test_missing_data_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="no data at .*expected a packed .npz or .npz.xz file, or torchvision's cifar10"
    ):
        cifar.load(tmp_path / "none", "cifar10")
    with pytest.raises(DataError, match="data_batch_1 is missing"):
        cifar.load(tmp_path, "cifar10")


def test_a_text_file_is_not_a_packed_one(tmp_path: Path) -> None:
    (tmp_path / "c.npz").write_text("hello")
    with pytest.raises(DataError, match="c.npz is not a packed CIFAR file: it is not an .npz archive"):
        cifar.load(tmp_path / "c.npz", "cifar10")


@pytest.mark.parametrize("content", [b"", b"PK", b"\xfd7zXZ"])
def test_a_damaged_packed_file(tmp_path: Path, content: bytes) -> None:
    for name in ("c.npz", "c.npz.xz"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="is not a packed CIFAR file"):
            cifar.load(tmp_path / name, "cifar10")


def test_the_other_cifar_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 10 classes, which is not cifar100"):
        cifar.load(_packed(tmp_path / "c.npz"), "cifar100")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_images": _pixels(20).transpose(0, 3, 1, 2)},
            r"shape \(20,\) for images of the shape \(20, 3, 32, 32\)",
        ),
        ({"test_images": _pixels(10) / 255}, r"10, 32, 32, 3\) in float64; expected .* \(N, 32, 32, 3\) in uint8"),
        ({"test_images": _pixels(9)}, r"shape \(10,\) for images of the shape \(9, 32, 32, 3\)"),
        ({"test_labels": np.arange(1, 11)}, "has the label 10; expected 0 to 9"),
        ({"train_labels": np.arange(20) % 10 - 1}, "has the label -1; expected 0 to 9"),
    ],
)
def test_arrays_that_are_no_cifar_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        cifar.load(_packed(tmp_path / "c.npz", **changes), "cifar10")


def test_a_packed_file_without_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train_labels"):
        cifar.load(_packed(tmp_path / "c.npz", train_labels=None), "cifar10")


def test_labels_and_names_of_other_shapes_are_refused(tmp_path: Path) -> None:
    for labels in (np.arange(20)[:, None] % 10, np.array(3)):
        with pytest.raises(DataError, match=r"has labels of the shape \((20, 1)?\) for images of the shape \(20, 32"):
            cifar.load(_packed(tmp_path / "c.npz", train_labels=labels), "cifar10")
    with pytest.raises(DataError, match="is not a packed CIFAR file: "):
        cifar.load(_packed(tmp_path / "c.npz", class_names=np.array("zero")), "cifar10")


def test_an_archive_with_a_wrong_byte_is_refused(tmp_path: Path) -> None:
    path = _packed(tmp_path / "c.npz")
    with np.load(path) as arrays:
        np.savez_compressed(tmp_path / "small.npz", **arrays)
    data, refused = bytearray((tmp_path / "small.npz").read_bytes()), 0
    for at in range(60, len(data), len(data) // 40):
        damaged = data.copy()
        damaged[at] ^= 0xFF
        path.write_bytes(damaged)
        try:
            _, (images, labels), _ = cifar.load(path, "cifar10")
        except DataError as error:
            refused += "is not a packed CIFAR file" in str(error)
        else:  # the byte said nothing about the arrays
            assert np.array_equal(images, _pixels(20)) and labels.tolist() == list(range(10)) * 2
    assert refused > 30
