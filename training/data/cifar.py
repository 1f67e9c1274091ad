"""CIFAR-10 and CIFAR-100 from disk, in selection order: the first n_k images of a class are its long-tailed set.

Read from packed long-tailed arrays (`.npz` or `.npz.xz`) or from torchvision's folder.
"""

from __future__ import annotations

import io
import lzma
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camcal.training.data.dataset import DataError

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]
Loaded = tuple[list[str], Arrays, Arrays]


def load(root: Path, name: str) -> Loaded:
    """Class names, the training part in selection order, and the full test part of `cifar10` or `cifar100`.

    Raises:
        DataError: if `root` holds neither form of the data, or its images are not 32×32 with labels.
    """
    if root.is_file():
        classes, train, test = _packed(root)
    elif root.is_dir():
        classes, train, test = _torchvision(root, name)
    else:
        raise DataError(f"no data at {root}: expected a packed .npz or .npz.xz file, or torchvision's {name} folder")
    if len(classes) != int(name.removeprefix("cifar")):
        raise DataError(f"{root} has {len(classes)} classes, which is not {name}")
    for images, labels in (train, test):
        if images.dtype != np.uint8 or labels.ndim != 1 or images.shape != (len(labels), 32, 32, 3):
            raise DataError(
                f"{root} has labels of the shape {labels.shape} for images of the shape {images.shape} in "
                f"{images.dtype}; expected (N,) for (N, 32, 32, 3) in uint8"
            )
        if wrong := sorted(set(labels.tolist()) - set(range(len(classes)))):
            raise DataError(f"{root} has the label {wrong[0]}; expected 0 to {len(classes) - 1}")
    return classes, train, test


def _packed(path: Path) -> Loaded:
    try:
        data = lzma.open(path).read() if path.suffix == ".xz" else path.read_bytes()
        if not data.startswith(b"PK"):
            raise ValueError("it is not an .npz archive")
        arrays = np.load(io.BytesIO(data))
        train = arrays["train_images"], arrays["train_labels"].astype(np.int64)
        test = arrays["test_images"], arrays["test_labels"].astype(np.int64)
        return [str(n) for n in arrays["class_names"]], train, test
    except Exception as error:  # damaged archives raise nearly anything
        raise DataError(f"{path} is not a packed CIFAR file: {str(error) or type(error).__name__}") from None


class _Plain(pickle.Unpickler):
    """Loads torchvision's files, which are pickles of plain arrays; anything else is refused."""

    allowed = {
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        # The files were written when NumPy's core had its old name.
        module = module.replace("numpy.core", "numpy._core")
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return super().find_class(module, name)


def _unpickle(path: Path, *keys: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = _Plain(file, encoding="latin1").load()
    except FileNotFoundError:
        raise DataError(f"{path} is missing: expected the folder that torchvision's download makes") from None
    except Exception as error:  # damaged pickles raise nearly anything
        raise DataError(f"{path} is not a CIFAR batch: {str(error) or type(error).__name__}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a CIFAR batch: it holds a {type(content).__name__}")
    if missing := [key for key in keys if key not in content]:
        raise DataError(f"{path} is not a CIFAR batch: it has no {missing[0]!r}")
    return content


def _torchvision(root: Path, name: str) -> Loaded:
    if name == "cifar10":
        base, label, meta, names = "cifar-10-batches-py", "labels", "batches.meta", "label_names"
        parts = [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]
    else:
        base, label, meta, names = "cifar-100-python", "fine_labels", "meta", "fine_label_names"
        parts = ["train"], ["test"]
    folder = root / base if (root / base).is_dir() else root

    def read(files: list[str]) -> Arrays:
        batches = [_unpickle(folder / file, "data", label) for file in files]
        flat = np.concatenate([batch["data"] for batch in batches])
        images = np.ascontiguousarray(flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        return images, np.array([value for batch in batches for value in batch[label]], dtype=np.int64)

    images, labels = read(parts[0])
    order = _selection_order(labels)
    return list(_unpickle(folder / meta, names)[names]), (images[order], labels[order]), read(parts[1])


def _selection_order(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The order in which LDAM's code selects images: seed 0, then one shuffle for each class in label order."""
    random = np.random.RandomState(0)
    order = []
    for label in range(int(labels.max()) + 1):
        where = np.flatnonzero(labels == label)
        random.shuffle(where)
        order.append(where)
    return np.concatenate(order)
