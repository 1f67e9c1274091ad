"""A model on disk: a folder with `model.onnx`, `report.json`, `canary.json`, and `manifest.json` with their checksums.

The graph takes `images` (uint8, N×H×W×3, RGB) and `top_k` (int64 scalar) and returns the arrays of `OUTPUTS`.
Nothing here needs torch or onnx: the service loads bundles with it.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from camcal.models.canary import CANARY_FILE, MAX_CANARY_BYTES, Canary
from camcal.models.onnx_files import external_files
from camcal.models.preprocessing import Preprocessing
from camcal.models.report import ServedReport
from camcal.models.untrusted import BundleError as BundleError
from camcal.models.untrusted import checksum, illegible, parse_json, read

SCHEMA_VERSION = 1
MODEL_FILE = "model.onnx"
REPORT_FILE = "report.json"
MANIFEST_FILE = "manifest.json"
INPUTS = ("images", "top_k")
OUTPUTS = ("logits", "calibrated_logits", "probabilities", "calibrated_probabilities", "top_classes", "maps")

MAX_MANIFEST_BYTES = 16 * 2**20
MAX_REPORT_BYTES = 64 * 2**20
MAX_MODEL_BYTES = 2 * 2**30  # ONNX cannot hold more in one file
MAX_FILES = 32
MAX_CLASSES = 65_536
SMALLEST, LARGEST = 1e-6, 1e6  # of anything fitted: beyond, products leave float32

Group = Literal["many", "medium", "few"]
GROUPS: tuple[Group, ...] = ("many", "medium", "few")
Prior = Literal["balanced", "train", "given"]
Precision = Literal["fp32", "fp16", "int8"]
Views = Literal["one", "flip"]
PlainPrior = Literal["balanced", "train", "other"]
"""The class prior that uncalibrated probabilities are for: uniform, the training frequencies, or something else."""


def group_of(train_count: int) -> Group:
    """The usual split by training images: many above 100, few below 20, medium between."""
    return "many" if train_count > 100 else "few" if train_count < 20 else "medium"


Side = Annotated[int, Field(ge=1, le=4096)]
Finite = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Positive = Annotated[float, Field(ge=SMALLEST, le=LARGEST)]


T = TypeVar("T", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ClassInfo(_Strict):
    """One class: its name, how many training images it had, and the group this puts it in."""

    name: str = Field(min_length=1, max_length=1000)
    train_count: int = Field(ge=1, le=10**12)
    group: Group

    @field_validator("name")
    @classmethod
    def _legible(cls, name: str) -> str:
        if found := illegible(name):
            raise ValueError(f"the class name {ascii(name)[:100]} holds {found}; control characters are not allowed")
        return name


class Calibration(_Strict):
    """What was fitted after training. For K classes:

    scalar: s of the normalised classifier, already inside the graph's `logits`.
    omega, beta, weight_norms: MARC, z'_j = ω_j·z_j + β_j·‖W_j‖ (arXiv 2112.07225), K values each; a lean that was
        fitted (`calibrate.method`) is a part of β.
    temperature: T; calibrated probabilities under a balanced prior are softmax(z'/T).
    probability_prior: the class prior that softmax(z) is for, which follows from loss and sampler; None if the bundle
        does not say.
    prior_temperatures: T of the probabilities for another prior π, softmax(z'/T + log π): the `train`ing prior, and the
        one that was `given`. T of the balanced prior where there is none.
    """

    scalar: Positive
    omega: list[Finite]
    beta: list[Finite]
    weight_norms: list[Finite]
    temperature: Positive
    probability_prior: PlainPrior | None = None
    prior_temperatures: dict[Prior, Positive] = {}

    @field_validator("omega")
    @classmethod
    def _positive(cls, omega: list[float]) -> list[float]:
        if min(omega, default=1.0) < SMALLEST:
            raise ValueError(
                f"every omega must be positive, {SMALLEST:g} or more: a negative one turns a class's map upside down"
            )
        return omega


class Manifest(_Strict):
    """`manifest.json`: everything that a server needs to know about `model.onnx`, and the checksum of every file.

    map_shift: the number of grid positions by which maps lie right of and below what they show.
    views: what of an image the graph looks at: `one`, the image as it is; or `flip`, its mirror image as well. Logits
        and maps are then the means of both, the mirrored map turned back.
    prior: the class frequencies expected in use, if the operator gave them: K positive numbers that sum to one. See
        `Calibration.prior_temperatures`.
    """

    schema_version: Literal[1]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    version: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    created: str = Field(max_length=64)
    classes: list[ClassInfo] = Field(min_length=2, max_length=MAX_CLASSES)
    preprocessing: Preprocessing
    calibration: Calibration
    grid: tuple[Side, Side]
    map_shift: float = Field(0.0, ge=-4096, le=4096)
    # Left out of a manifest where it is one, which older servers assume.
    views: Views = Field(default="one", exclude_if=lambda found: found == "one")
    precision: Precision = "fp32"  # of the trunk; CAMC, head and maps are always fp32
    figures: dict[str, Any]
    recipe: dict[str, Any]
    prior: list[float] | None = None
    files: dict[str, str] = Field(max_length=MAX_FILES)

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
            if Path(name).name != name or name in ("", ".", "..", MANIFEST_FILE) or len(name) > 255:
                raise ValueError(f"files lists {name[:100]!r}, which is not a plain file name")
        if len({c.name for c in self.classes}) != len(self.classes):
            raise ValueError("class names are not unique")
        return self

    @property
    def priors(self) -> tuple[Prior, ...]:
        """The priors that calibrated probabilities can be requested for."""
        return ("balanced", "train") if self.prior is None else ("balanced", "train", "given")

    @property
    def shift(self) -> tuple[float, float]:
        """By how many positions maps lie to the right of and below what they show.

        A map's shift to the right and that of the mirrored map, once turned back, to the left cancel.
        """
        return (0.0 if self.views == "flip" else self.map_shift), self.map_shift

    def window(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Where the seen part of a width×height picture lies in the grid: left, top, right, bottom, in positions."""
        (rows, columns), size = self.grid, self.preprocessing.input_size
        left, top, right, bottom = self.preprocessing.place(width, height)
        across, down = columns / size, rows / size
        x, y = self.shift
        return left * across + x, top * down + y, right * across + x, bottom * down + y

    def train_counts(self) -> NDArray[np.int64]:
        """Training images per class, K values."""
        return np.array([c.train_count for c in self.classes], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A verified bundle. Make one with `Bundle.load`.

    canary: None if the bundle has none.
    digest: the SHA-256 of the manifest, and so of the whole bundle.
    """

    path: Path
    manifest: Manifest
    report: ServedReport
    canary: Canary | None
    digest: str
    max_model_bytes: int

    @property
    def model_path(self) -> Path:
        return self.path / MODEL_FILE

    @classmethod
    def load(cls, path: Path | str, *, max_model_bytes: int = MAX_MODEL_BYTES, digest: str | None = None) -> Bundle:
        """Read and verify the bundle in folder `path`, whoever made it.

        Args:
            path: the folder.
            max_model_bytes: the largest file of the model.
            digest: of the expected bundle; any by default.

        Raises:
            BundleError: if the folder or a file is missing or too large, a checksum differs, the manifest's schema
                version is unknown or its fields do not fit together, or the graph reads weights from an unlisted file.
        """
        path = Path(path)
        _require_folder(path)
        data = read(path, MANIFEST_FILE, MAX_MANIFEST_BYTES)
        found = hashlib.sha256(data).hexdigest()
        if digest not in (None, found):
            raise BundleError(f"{path} changed while it was loaded")
        manifest = _parse_manifest(data, path / MANIFEST_FILE)
        bundle = cls(
            path=path,
            manifest=manifest,
            report=_read_report(path, manifest),
            canary=_read_canary(path, manifest),
            digest=found,
            max_model_bytes=max_model_bytes,
        )
        bundle._verify_weights()
        return bundle

    def read_model(self) -> bytes:
        """The graph, verified again. Raises BundleError if it has changed since `load`."""
        return _read_listed(self.path, self.manifest, MODEL_FILE, self.max_model_bytes)

    def verify_unchanged(self) -> None:
        """Raises BundleError if the folder has changed since `load`; the manifest stands for graph and report."""
        if manifest_checksum(self.path) != self.digest:
            raise BundleError(f"{self.path} changed while it was loaded")
        self._verify_others()

    def _verify_weights(self) -> None:
        try:
            outside = external_files(self.read_model())
        except ValueError as error:
            if isinstance(error, BundleError):
                raise
            raise BundleError(f"{MODEL_FILE} is not a readable ONNX file: {error}") from None
        if unlisted := outside - self.manifest.files.keys():
            name = min(unlisted)
            raise BundleError(f"{MODEL_FILE} reads weights from {name[:255]!r}, which the manifest does not list")
        self._verify_others()

    def _verify_others(self) -> None:
        for name in self.manifest.files.keys() - {MODEL_FILE, REPORT_FILE, CANARY_FILE}:
            _matching(self.path / name, checksum(self.path, name, self.max_model_bytes), self.manifest.files[name])


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, the last file of a bundle, so that an interrupted export is not mistaken for one.

    A missing prior is left out.
    """
    absent = {"prior"} if manifest.prior is None else set()
    partial = folder / (MANIFEST_FILE + ".partial")
    partial.write_text(manifest.model_dump_json(indent=1, exclude=absent) + "\n")
    os.replace(partial, folder / MANIFEST_FILE)


def write_bundle(folder: Path, manifest: Manifest, canary: Canary) -> None:
    """Write canary and manifest beside graph and report, with the canary's checksum in the manifest."""
    data = canary.model_dump_json().encode() + b"\n"
    partial = folder / (CANARY_FILE + ".partial")
    partial.write_bytes(data)
    os.replace(partial, folder / CANARY_FILE)
    files = manifest.files | {CANARY_FILE: hashlib.sha256(data).hexdigest()}
    write_manifest(folder, manifest.model_copy(update={"files": files}))


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_checksum(folder: Path) -> str:
    """The SHA-256 of the manifest, which lists those of all other files. Raises BundleError if it cannot be read."""
    _require_folder(folder)
    return checksum(folder, MANIFEST_FILE, MAX_MANIFEST_BYTES)


def _require_folder(path: Path) -> None:
    if not path.is_dir():
        raise BundleError(f"no bundle at {path}: expected a folder with {MANIFEST_FILE}, {MODEL_FILE}, {REPORT_FILE}")


def _parse_manifest(data: bytes, shown: Path) -> Manifest:
    raw = parse_json(data, shown, strict=True)
    if (version := raw.get("schema_version")) != SCHEMA_VERSION:
        raise BundleError(f"{shown} has schema version {version!r:.20}; this camcal reads {SCHEMA_VERSION}")
    return _validated(Manifest, raw, shown)


def _validated(model: type[T], raw: dict[str, Any], shown: Path) -> T:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or shown.stem
        raise BundleError(f"{shown}: {where}: {first['msg']}") from None


def _read_listed(folder: Path, manifest: Manifest, name: str, max_bytes: int) -> bytes:
    data = read(folder, name, max_bytes)
    _matching(folder / name, hashlib.sha256(data).hexdigest(), manifest.files[name])
    return data


def _read_report(folder: Path, manifest: Manifest) -> ServedReport:
    data = _read_listed(folder, manifest, REPORT_FILE, MAX_REPORT_BYTES)
    shown = folder / REPORT_FILE
    return _validated(ServedReport, parse_json(data, shown, strict=False), shown)


def _read_canary(folder: Path, manifest: Manifest) -> Canary | None:
    if CANARY_FILE not in manifest.files:
        return None
    data = _read_listed(folder, manifest, CANARY_FILE, MAX_CANARY_BYTES)
    try:
        canary = Canary.model_validate(parse_json(data, folder / CANARY_FILE, strict=True))
        canary.check_shapes(len(manifest.classes), manifest.grid)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{folder / CANARY_FILE}: {where}: {first['msg']}") from None
    return canary


def _matching(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise BundleError(f"{path} was changed: its sha256 is {found[:12]}…, the manifest says {expected[:12]}…")
