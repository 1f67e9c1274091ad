import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from camcal.models.bundle import Bundle, BundleError, group_of, sha256


@pytest.fixture
def copy(digits_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of its own for each test to break."""
    return Path(shutil.copytree(digits_bundle, tmp_path / "bundle"))


def _edit(bundle: Path, **changes: Any) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | changes))


def _reseal(bundle: Path) -> None:
    """Make the checksums true again after a deliberate change."""
    _edit(bundle, files={name: sha256(bundle / name) for name in ("model.onnx", "report.json")})


def test_a_bundle_loads(digits_bundle: Path) -> None:
    bundle = Bundle.load(digits_bundle)
    assert bundle.manifest.grid == (8, 8)
    assert [c.name for c in bundle.manifest.classes][:3] == ["zero", "one", "two"]
    assert bundle.manifest.train_counts()[0] == 130
    assert bundle.report.reliability is not None and len(bundle.report.reliability["calibrated"]) == 15


@pytest.mark.parametrize(("count", "group"), [(1, "few"), (19, "few"), (20, "medium"), (100, "medium"), (101, "many")])
def test_groups(count: int, group: str) -> None:
    assert group_of(count) == group


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle at .*nowhere: expected a folder with manifest.json"):
        Bundle.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "report.json"])
def test_a_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        Bundle.load(copy)


@pytest.mark.parametrize("name", ["model.onnx", "report.json"])
def test_one_byte_changed(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} was changed: its sha256 is"):
        Bundle.load(copy)


def test_an_unknown_schema_version(copy: Path) -> None:
    _edit(copy, schema_version=2)
    with pytest.raises(BundleError, match="schema version 2; this camcal reads 1"):
        Bundle.load(copy)


@pytest.mark.parametrize("content", ["{", "[]", '"text"'])
def test_a_manifest_that_is_no_json_object(copy: Path, content: str) -> None:
    (copy / "manifest.json").write_text(content)
    with pytest.raises(BundleError, match="manifest.json"):
        Bundle.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": [{"name": "a", "train_count": 3, "group": "few"}]}, "classes"),
        ({"grid": "8x8"}, "grid"),
        ({"surprise": 1}, "surprise"),
        ({"files": {"model.onnx": "0"}}, "does not list report.json"),
        ({"files": {"model.onnx": "0", "report.json": "0", "../x": "0"}}, "not a plain file name"),
        ({"name": "../up"}, "name"),
    ],
)
def test_a_manifest_with_a_wrong_field(copy: Path, change: dict[str, Any], message: str) -> None:
    _edit(copy, **change)
    with pytest.raises(BundleError, match=message):
        Bundle.load(copy)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("omega", [1.0] * 9, "calibration.omega has 9 values for 10 classes"),
        ("omega", [-1.0] + [1.0] * 9, "omega must be positive"),
        ("temperature", 0, "temperature"),
        ("beta", [float("nan")] * 10, "NaN is not a finite number"),
        ("beta", [1e38] * 10, r"calibration.beta.0: Input should be less than or equal to 1000000"),
        ("scalar", 1e-300, "calibration.scalar: Input should be greater than or equal to 0.000001"),
        ("temperature", 10**30, "is too large a number"),
    ],
)
def test_a_calibration_that_cannot_be(copy: Path, field: str, value: Any, message: str) -> None:
    calibration = json.loads((copy / "manifest.json").read_text())["calibration"]
    _edit(copy, calibration=calibration | {field: value})
    with pytest.raises(BundleError, match=message):
        Bundle.load(copy)


def test_two_classes_of_one_name(copy: Path) -> None:
    classes = json.loads((copy / "manifest.json").read_text())["classes"]
    classes[1]["name"] = classes[0]["name"]
    _edit(copy, classes=classes)
    with pytest.raises(BundleError, match="class names are not unique"):
        Bundle.load(copy)


def _externalise(bundle: Path, location: str) -> None:
    model = onnx.load(bundle / "model.onnx")
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    onnx.external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    (bundle / "model.onnx").write_bytes(model.SerializeToString())


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "weights.bin"])
def test_weights_in_a_file_that_the_manifest_does_not_list(copy: Path, location: str) -> None:
    _externalise(copy, location)
    _reseal(copy)
    with pytest.raises(BundleError, match=f"reads weights from '{location}', which the manifest does not list"):
        Bundle.load(copy)


@pytest.mark.parametrize("data", [b"\x3a\xff\xff", b"\x0b\x00", b"\x80"])
def test_a_model_that_is_not_onnx(copy: Path, data: bytes) -> None:
    (copy / "model.onnx").write_bytes(data)
    _reseal(copy)
    with pytest.raises(BundleError, match="not a readable ONNX file"):
        Bundle.load(copy)


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ([0.5, 0.5], "prior has 2 values for 10 classes"),
        ([0.2] * 10, "prior must be positive and sum to one"),
        ([0.0, *[1 / 9] * 9], "prior must be positive and sum to one"),
    ],
)
def test_a_prior_that_does_not_fit_the_classes(copy: Path, prior: list[float], message: str) -> None:
    _edit(copy, prior=prior)
    with pytest.raises(BundleError, match=message):
        Bundle.load(copy)


def test_a_prior_that_fits(copy: Path) -> None:
    _edit(copy, prior=[0.1] * 10)
    assert Bundle.load(copy).manifest.prior == [0.1] * 10


@pytest.mark.parametrize(
    ("fit", "size", "window"),
    [
        ("crop", (400, 100), (0.25, 0.25, 8.25, 8.25)),
        ("stretch", (400, 100), (0.25, 0.25, 8.25, 8.25)),
        ("letterbox", (400, 100), (0.25, 3.25, 8.25, 5.25)),
        ("letterbox", (100, 200), (2.25, 0.25, 6.25, 8.25)),
    ],
)
def test_where_a_picture_lies_in_the_grid(
    copy: Path, fit: str, size: tuple[int, int], window: tuple[float, float, float, float]
) -> None:
    rule = json.loads((copy / "manifest.json").read_text())["preprocessing"]
    _edit(copy, preprocessing=rule | {"fit": fit}, map_shift=0.25)
    assert Bundle.load(copy).manifest.window(*size) == pytest.approx(window)
    _edit(copy, views="flip")  # the mirrored map is shifted the other way
    left, top, right, bottom = window
    expected = (left - 0.25, top, right - 0.25, bottom)
    assert Bundle.load(copy).manifest.window(*size) == pytest.approx(expected)
