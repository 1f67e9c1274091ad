"""A model on disk: a folder with `model.onnx`, `report.json` and the `manifest.json` that vouches for both.

The graph takes `images` (uint8, N×H×W×3, RGB) and `top_k` (int64 scalar) and returns the arrays of `OUTPUTS`.
Nothing here needs torch or onnx: the service loads bundles with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from models.preprocessing import Preprocessing

SCHEMA_VERSION = 1
MODEL_FILE = "model.onnx"
REPORT_FILE = "report.json"
MANIFEST_FILE = "manifest.json"
INPUTS = ("images", "top_k")
OUTPUTS = ("logits", "calibrated_logits", "probabilities", "calibrated_probabilities", "top_classes", "maps")

Group = Literal["many", "medium", "few"]
GROUPS: tuple[Group, ...] = ("many", "medium", "few")
Prior = Literal["balanced", "train", "given"]
Precision = Literal["fp32", "fp16", "int8"]


class BundleError(ValueError):
    """A folder that is not a bundle, or no longer the bundle that its manifest describes."""


def group_of(train_count: int) -> Group:
    """The usual split by training images: many above 100, few below 20, medium between."""
    return "many" if train_count > 100 else "few" if train_count < 20 else "medium"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ClassInfo(_Strict):
    """One class: its name, how many training images it had, and the group this puts it in."""

    name: str = Field(min_length=1)
    train_count: int = Field(ge=1)
    group: Group


class Calibration(_Strict):
    """What was fitted after training. For K classes:

    scalar: s of the normalised classifier, already inside the graph's `logits`.
    omega, beta, weight_norms: MARC, z'_j = ω_j·z_j + β_j·‖W_j‖ (arXiv 2112.07225), K values each; a lean that was
        fitted (`calibrate.lean`) is a part of β.
    temperature: T; calibrated probabilities under a balanced prior are softmax(z'/T).
    prior_temperatures: T of the probabilities for another prior π, softmax(z'/T + log π): the `train`ing prior, and the
        one that was `given`. T of the balanced prior where there is none.
    """

    scalar: float = Field(gt=0)
    omega: list[float]
    beta: list[float]
    weight_norms: list[float]
    temperature: float = Field(gt=0)
    prior_temperatures: dict[Prior, Annotated[float, Field(gt=0)]] = {}

    @field_validator("omega")
    @classmethod
    def _positive(cls, omega: list[float]) -> list[float]:
        if min(omega, default=1.0) <= 0:
            raise ValueError("every omega must be positive: a negative one turns a class's map upside down")
        return omega


class Manifest(_Strict):
    """`manifest.json`: everything a server needs to know about `model.onnx`, and the checksum of every file.

    map_shift: by how many positions of their grid maps lie right of and below what they show.
    prior: the class frequencies expected in use, where the operator gave some: K positive numbers that sum to one.
        See `Calibration.prior_temperatures`.
    """

    schema_version: Literal[1]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    version: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    created: str
    classes: list[ClassInfo] = Field(min_length=2)
    preprocessing: Preprocessing
    calibration: Calibration
    grid: tuple[int, int]
    map_shift: float = 0.0
    precision: Precision = "fp32"  # of the trunk; CAMC, head and maps are always fp32
    figures: dict[str, Any]
    recipe: dict[str, Any]
    prior: list[float] | None = None
    files: dict[str, str]

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        for field in ("omega", "beta", "weight_norms"):
            if (found := len(getattr(self.calibration, field))) != len(self.classes):
                raise ValueError(f"calibration.{field} has {found} values for {len(self.classes)} classes")
        if self.prior is not None:
            if len(self.prior) != len(self.classes):
                raise ValueError(f"prior has {len(self.prior)} values for {len(self.classes)} classes")
            if min(self.prior) <= 0 or abs(sum(self.prior) - 1) > 1e-6:
                raise ValueError("prior must be positive and sum to one")
        if missing := {MODEL_FILE, REPORT_FILE} - self.files.keys():
            raise ValueError(f"files does not list {', '.join(sorted(missing))}")
        for name in self.files:
            if Path(name).name != name or name in ("", ".", ".."):
                raise ValueError(f"files lists {name!r}, which is not a plain file name")
        if len({c.name for c in self.classes}) != len(self.classes):
            raise ValueError("class names are not unique")
        return self

    @property
    def priors(self) -> tuple[Prior, ...]:
        """Those that calibrated probabilities may be asked for."""
        return ("balanced", "train") if self.prior is None else ("balanced", "train", "given")

    def train_counts(self) -> NDArray[np.int64]:
        """Training images per class, K values."""
        return np.array([c.train_count for c in self.classes], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A verified bundle. Make one with `Bundle.load`."""

    path: Path
    manifest: Manifest
    report: dict[str, Any]

    @property
    def model_path(self) -> Path:
        return self.path / MODEL_FILE

    @classmethod
    def load(cls, path: Path | str) -> Bundle:
        """Read and verify the bundle in folder `path`.

        Raises:
            BundleError: if the folder or a file is missing, a checksum differs, the manifest's schema version is
                unknown or its fields do not fit together, or the graph reads weights from an unlisted file.
        """
        path = Path(path)
        if not path.is_dir():
            raise BundleError(
                f"no bundle at {path}: expected a folder with {MANIFEST_FILE}, {MODEL_FILE}, {REPORT_FILE}"
            )
        manifest = _read_manifest(path)
        for name, expected in manifest.files.items():
            _verify(path, name, expected)
        unlisted = set(_external_data((path / MODEL_FILE).read_bytes())) - manifest.files.keys()
        if unlisted:
            raise BundleError(
                f"{MODEL_FILE} reads weights from {sorted(unlisted)[0]!r}, which the manifest does not list"
            )
        return cls(path=path, manifest=manifest, report=_read_json(path, REPORT_FILE))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, the last file of a bundle, so that an interrupted export is never taken for one.

    A prior that was not given is left out.
    """
    absent = {"prior"} if manifest.prior is None else set()
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=1, exclude=absent) + "\n")


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((folder / name).read_bytes())
    except FileNotFoundError:
        raise BundleError(f"{folder} is not a bundle: {name} is missing") from None
    except (ValueError, OSError) as error:
        raise BundleError(f"{folder / name} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise BundleError(f"{folder / name} must hold a JSON object")
    return value


def _read_manifest(folder: Path) -> Manifest:
    raw = _read_json(folder, MANIFEST_FILE)
    if (version := raw.get("schema_version")) != SCHEMA_VERSION:
        raise BundleError(
            f"{folder / MANIFEST_FILE} has schema version {version!r}; this camcal reads {SCHEMA_VERSION}"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise BundleError(f"{folder / MANIFEST_FILE}: {where}: {first['msg']}") from None


def _verify(folder: Path, name: str, expected: str) -> None:
    file = folder / name
    if not file.is_file():
        raise BundleError(f"{folder} is incomplete: {name} is missing")
    if (found := sha256(file)) != expected:
        raise BundleError(f"{file} was changed: its sha256 is {found[:12]}…, the manifest says {expected[:12]}…")


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields of one protobuf message: (field number, bytes)."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        match key & 7:
            case 0:
                varint()
            case 1:
                at += 8
            case 2:
                size = varint()
                if at + size > len(message):
                    raise IndexError
                yield key >> 3, message[at : at + size]
                at += size
            case 5:
                at += 4
            case kind:
                raise ValueError(f"protobuf wire type {kind}")


# Which fields of onnx.proto lead to a tensor: message → {field number: message it holds}.
_TENSOR_PATHS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external"},
}


def _external_data(model: bytes) -> Iterator[str]:
    """The file names from which an ONNX model would read weights (TensorProto.external_data, key `location`)."""

    def walk(kind: str, message: memoryview) -> Iterator[str]:
        if kind == "external":
            entry = {number: bytes(value).decode() for number, value in _fields(message)}
            if entry.get(1) == "location":
                yield entry.get(2, "")
            return
        for number, value in _fields(message):
            if child := _TENSOR_PATHS[kind].get(number):
                yield from walk(child, value)

    try:
        yield from walk("model", memoryview(model))
    except (IndexError, ValueError):
        raise BundleError(f"{MODEL_FILE} is not a readable ONNX file") from None
