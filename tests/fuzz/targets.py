"""The parsers of the service, each as a function of bytes that fails on anything but its own kind of error."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from camcal.models.bundle import MANIFEST_FILE, MODEL_FILE, Bundle, BundleError, sha256
from camcal.service.http.inference_protocol import ProtocolError, parse
from camcal.service.http.multipart import FormError, parse_form

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "models/pretrained/cifar10-lt-if100"
MAX_PARTS, SIZE, MAX_IMAGES = 8, 4, 3


@dataclass(frozen=True, kw_only=True)
class Target:
    """A parser, and inputs from which its fuzzing begins."""

    check: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


def multipart(data: bytes) -> None:
    """The content type is the first line, the form what follows."""
    content_type, _, body = data.partition(b"\n")
    try:
        parts = parse_form(content_type.decode("latin-1"), body, MAX_PARTS)
    except FormError:
        return
    assert len(parts) <= MAX_PARTS
    assert sum(len(part.data) for part in parts) <= len(body)
    assert all(part.name for part in parts)


def inference(data: bytes) -> None:
    """The length of the JSON is the first line, empty for none, the body what follows."""
    length, _, body = data.partition(b"\n")
    try:
        found = parse(bytearray(body), length.decode("latin-1") or None, SIZE, MAX_IMAGES)
    except ProtocolError as error:
        assert len(str(error)) < 1000
        return
    assert found.images.shape[1:] == (SIZE, SIZE, 3) and 1 <= len(found.images) <= MAX_IMAGES
    assert found.images.dtype == "uint8"


def manifest(data: bytes) -> None:
    """`manifest.json` beside the files of a sound bundle."""
    folder = _bundle()
    (folder / MANIFEST_FILE).write_bytes(data)
    _load(folder)


def model(data: bytes) -> None:
    """`model.onnx` with the right checksum; it is read before ONNX Runtime sees it."""
    folder = _bundle()
    told = json.loads((BUNDLE / MANIFEST_FILE).read_bytes())
    (folder / MODEL_FILE).write_bytes(data)
    told["files"][MODEL_FILE] = sha256(folder / MODEL_FILE)
    (folder / MANIFEST_FILE).write_text(json.dumps(told))
    _load(folder)


def _load(folder: Path) -> None:
    try:
        Bundle.load(folder)
    except BundleError as error:
        assert len(str(error)) < 2000


@cache
def _bundle() -> Path:
    """A copy of a sound bundle, to be written over."""
    held = tempfile.TemporaryDirectory(prefix="camcal-fuzz-")
    _held.append(held)
    for file in BUNDLE.iterdir():
        shutil.copy(file, held.name)
    return Path(held.name)


_held: list[tempfile.TemporaryDirectory[str]] = []


def _form(*parts: bytes) -> bytes:
    body = b"".join(b"--b\r\n" + part + b"\r\n" for part in parts)
    return b"multipart/form-data; boundary=b\n" + body + b"--b--\r\n"


def _small_model() -> bytes:
    """A few fields of a graph with weights in another file."""
    external = b"\x6a\x0e\x0a\x08location\x12\x02\x2e\x2e"
    tensor = b"\x2a" + bytes([len(external)]) + external
    return b"\x08\x08\x3a" + bytes([len(tensor)]) + tensor


def _tensors(shape: list[int], **more: object) -> bytes:
    tensor = {"name": "images", "shape": shape, "datatype": "UINT8", **more}
    top_k = {"name": "top_k", "shape": [1], "datatype": "INT64", "data": [2]}
    return json.dumps({"id": "1", "inputs": [tensor, top_k], "outputs": [{"name": "maps"}]}).encode()


BINARY = _tensors([1, SIZE, SIZE, 3], parameters={"binary_data_size": SIZE * SIZE * 3})
TARGETS = {
    "multipart": Target(
        check=multipart,
        seeds=(
            _form(b'Content-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\nDATA'),
            _form(b"content-disposition: form-data;\r\n name=prior\r\n\r\ntrain", b"X: y\r\n\r\n"),
            b'multipart/form-data; boundary="a b"\npreamble\r\n--a b \t\r\n\r\n\r\n--a b--',
        ),
    ),
    "inference": Target(
        check=inference,
        seeds=(
            b"\n" + _tensors([1, SIZE, SIZE, 3], data=[0] * SIZE * SIZE * 3),
            b"%d\n" % len(BINARY) + BINARY + bytes(SIZE * SIZE * 3),
            b"\n{}",
        ),
    ),
    "manifest": Target(check=manifest, seeds=((BUNDLE / MANIFEST_FILE).read_bytes(), b"{}", b'{"schema_version": 1}')),
    "model": Target(check=model, seeds=(_small_model(), b"")),
}
