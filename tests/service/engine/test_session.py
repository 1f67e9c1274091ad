from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from camcal.models.bundle import MODEL_FILE, REPORT_FILE, Bundle, BundleError, Manifest, sha256, write_manifest
from camcal.service.engine.session import DeviceError, ImageBatch, Outputs, Session, load_session, load_sessions
from camcal.service.settings import Settings


def images(count: int, size: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, size=(count, size, size, 3), dtype=np.uint8)


def changed(bundle: Bundle, folder: Path, **changes: object) -> Bundle:
    """A copy of `bundle` with other values in its manifest."""
    shutil.copytree(bundle.path, folder)
    files = {name: sha256(folder / name) for name in (MODEL_FILE, REPORT_FILE)}
    manifest = Manifest.model_validate(bundle.manifest.model_dump() | {"files": files} | changes)
    write_manifest(folder, manifest)
    return Bundle.load(folder)


def test_outputs_have_the_shapes_of_the_manifest(session: Session) -> None:
    manifest = session.bundle.manifest
    outputs = session.run(images(3, manifest.preprocessing.input_size), top_k=2)
    assert outputs.logits.shape == outputs.calibrated_probabilities.shape == (3, len(manifest.classes))
    assert outputs.top_classes.shape == (3, 2)
    assert outputs.maps.shape == (3, 2, *manifest.grid)
    np.testing.assert_allclose(outputs.calibrated_probabilities.sum(axis=1), 1, rtol=1e-5)


def test_maps_sum_to_their_logits(session: Session) -> None:
    manifest = session.bundle.manifest
    outputs = session.run(images(5, manifest.preprocessing.input_size), top_k=len(manifest.classes))
    sums = outputs.maps.sum(axis=(2, 3), dtype=np.float64)
    np.testing.assert_allclose(sums, np.take_along_axis(outputs.logits, outputs.top_classes, axis=1), 1e-4, 1e-4)


def test_outputs_do_not_depend_on_the_batch(session: Session) -> None:
    batch = images(5, session.bundle.manifest.preprocessing.input_size)
    together = session.run(batch, top_k=1)
    alone = [session.run(batch[i : i + 1], top_k=1) for i in range(5)]
    np.testing.assert_allclose(together.logits, np.concatenate([one.logits for one in alone]), rtol=1e-4, atol=1e-5)


def test_buckets(bundle: Bundle) -> None:
    session = Session(bundle, device="cpu", threads=1, max_batch=6, pad=True)
    assert session.buckets() == [1, 2, 4, 6]
    assert [session.bucket(count) for count in range(1, 7)] == [1, 2, 4, 4, 6, 6]
    assert Session(bundle, device="cpu", threads=1, max_batch=1, pad=True).buckets() == [1]
    assert Session(bundle, device="cpu", threads=1, max_batch=6).buckets() == [1, 2, 3, 4, 5, 6]


def test_concurrent_batches_equal_batches_alone(bundle: Bundle) -> None:
    session = Session(bundle, device="cpu", threads=2)
    assert session.lanes == 2
    assert Session(bundle, device="cpu", threads=1).lanes == 1
    batch = images(3, bundle.manifest.preprocessing.input_size)
    alone = session.run(batch, 1)
    with ThreadPoolExecutor(2) as threads:
        for concurrent in threads.map(lambda _: session.run(batch, 1, alone=False), range(8)):
            np.testing.assert_allclose(concurrent.logits, alone.logits, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(concurrent.maps, alone.maps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_load_session_warms_up(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    runs: list[tuple[int, bool]] = []
    run = Session.run

    def record(self: Session, images: ImageBatch, top_k: int, alone: bool = True) -> Outputs:
        runs.append((len(images), alone))
        return run(self, images, top_k, alone)

    monkeypatch.setattr(Session, "run", record)
    session = load_session(Settings(bundle=bundle.path, max_batch=4, intra_threads=threads))
    assert session.provider == "CPUExecutionProvider"
    assert session.fallback is None
    checked, *warmed = runs
    assert checked == (1, True)
    assert set(warmed) == {(size, alone) for size in (1, 4) for alone in {True, session.lanes == 1}}


def test_padding_does_not_change_the_outputs(bundle: Bundle) -> None:
    session = Session(bundle, device="cpu", threads=1, pad=True)
    size = bundle.manifest.preprocessing.input_size
    before = session.run(images(3, size), top_k=2)
    session.run(images(8, size, seed=1), top_k=1)
    after = session.run(list(images(3, size)), top_k=2)  # a list instead of an array
    np.testing.assert_allclose(after.logits, before.logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after.maps, before.maps, rtol=1e-4, atol=1e-5)


def test_padded_batches_equal_others_and_own_their_outputs(bundle: Bundle) -> None:
    padded, plain = (Session(bundle, device="cpu", threads=1, pad=pad) for pad in (True, False))
    size = bundle.manifest.preprocessing.input_size
    batches = [(images(count, size, seed=count), top_k) for count, top_k in ((3, 2), (4, 1), (1, 2), (4, 2))]
    results = [padded.run(batch, top_k) for batch, top_k in batches]  # they share input buffers, but not outputs
    for (batch, top_k), result in zip(batches, results, strict=True):
        for name, expected in vars(plain.run(batch, top_k)).items():
            np.testing.assert_allclose(getattr(result, name), expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_two_sessions_agree(bundle: Bundle) -> None:
    one, other = load_sessions(Settings(bundle=bundle.path, max_batch=2, sessions=2))
    batch = images(2, bundle.manifest.preprocessing.input_size)
    np.testing.assert_allclose(one.run(batch, 1).logits, other.run(batch, 1).logits, rtol=1e-4, atol=1e-5)


def test_cuda_fails_without_cuda(bundle: Bundle) -> None:
    with pytest.raises(DeviceError, match="built without CUDA"):
        Session(bundle, device="cuda")


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
def test_cuda_that_does_not_start(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """ONNX Runtime reports CUDA as available, but the machine has no GPU."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    session = Session(bundle, device="auto", threads=1)
    assert session.provider == "CPUExecutionProvider"
    assert session.fallback is not None
    assert session.fallback in caplog.text
    with pytest.raises(DeviceError, match="device is cuda, but ONNX Runtime cannot initialize CUDA"):
        Session(bundle, device="cuda", threads=1)


def test_manifest_with_another_grid_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"maps has shape \(1, 2, 8, 8\); the manifest says \(1, 2, 3, 3\)"):
        Session(changed(bundle, tmp_path / "b", grid=(3, 3)), threads=1)


def test_manifest_with_another_input_size_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    rule = bundle.manifest.preprocessing.model_dump() | {"input_size": 5}
    with pytest.raises(BundleError, match="does not take images of 5×5 px"):
        Session(changed(bundle, tmp_path / "b", preprocessing=rule), threads=1)


def test_graph_with_another_input_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "b"
    shutil.copytree(bundle.path, folder)
    model = onnx.load(folder / MODEL_FILE)
    for node in [*model.graph.input, *model.graph.output]:
        node.name = node.name.replace("images", "pixels")
    for operation in model.graph.node:
        operation.input[:] = [name.replace("images", "pixels") for name in operation.input]
    onnx.save(model, folder / MODEL_FILE)
    files = {name: sha256(folder / name) for name in bundle.manifest.files}
    write_manifest(folder, bundle.manifest.model_copy(update={"files": files}))
    with pytest.raises(BundleError, match=r"takes \['pixels', 'top_k'\] .* expected \['images', 'top_k'\]"):
        Session(Bundle.load(folder), threads=1)


def test_empty_model_file_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "b"
    shutil.copytree(bundle.path, folder)
    (folder / MODEL_FILE).write_bytes(b"")
    files = {name: sha256(folder / name) for name in bundle.manifest.files}
    write_manifest(folder, bundle.manifest.model_copy(update={"files": files}))
    with pytest.raises(BundleError, match="ONNX Runtime cannot load model.onnx"):
        Session(Bundle.load(folder), threads=1)
