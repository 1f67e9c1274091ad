"""Reload and shutdown under load."""

from __future__ import annotations

import gc
import shutil
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import onnx
import pytest
from onnx import helper

from camcal.models.bundle import MODEL_FILE, REPORT_FILE, Bundle, BundleError, Manifest, sha256, write_manifest
from camcal.service.engine import served, session
from camcal.service.engine.model import Model
from camcal.service.engine.proofs import Proofs
from camcal.service.http.app import create_app
from camcal.service.settings import Settings
from tests.service import hostile
from tests.service.conftest import TestClient, png
from tests.service.http.routes.test_predict import RAW
from tests.service.test_live import metric, process, running, wait_for

RELOADS = 100


@pytest.fixture(scope="module")
def other(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same model with doubled logits and maps and halved omega. Mixing both models gives wrong sums."""
    folder = tmp_path_factory.mktemp("other") / "bundle"
    shutil.copytree(bundle.path, folder)
    graph = onnx.load(folder / MODEL_FILE)
    plain = {"logits": "plain_logits", "maps": "plain_maps"}
    for node in graph.graph.node:
        node.input[:] = [plain.get(name, name) for name in node.input]
        node.output[:] = [plain.get(name, name) for name in node.output]
    for name, source in plain.items():
        graph.graph.node.append(helper.make_node("Add", [source, source], [name]))
    onnx.save(graph, folder / MODEL_FILE)
    manifest = bundle.manifest.model_dump() | {"version": "doubled"}
    manifest["calibration"]["omega"] = [omega / 2 for omega in manifest["calibration"]["omega"]]
    manifest["files"] = {name: sha256(folder / name) for name in (MODEL_FILE, REPORT_FILE)}
    write_manifest(folder, Manifest.model_validate(manifest))
    return Bundle.load(folder)


@pytest.fixture(scope="module")
def broken(other: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken") / "bundle"
    shutil.copytree(other.path, folder)
    (folder / MODEL_FILE).write_bytes(b"cut off")
    return folder


def predict(client: httpx.Client, seed: int) -> dict[str, Any]:
    response = client.post("/predict?top_k=2&logits=all", content=png(seed), headers=RAW)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body | {"close": response.headers.get("connection") == "close"}


def check_map(client: httpx.Client, body: dict[str, Any]) -> None:
    """The maps of a prediction sum to the scores of the same prediction."""
    best = body["predictions"][0]
    for calibrated, score in ((True, best["calibrated_logit"]), (False, best["logit"])):
        numbers = client.get(body["cam"]["url"], params={"format": "json", "calibrated": calibrated}).json()
        assert numbers["sum"] == pytest.approx(score, rel=1e-3, abs=1e-3)


@contextmanager
def load(url: str, send: Callable[[httpx.Client, int], bool], clients: int = 6) -> Iterator[list[Future[int]]]:
    """Start clients that call `send` until it returns True or the block ends. Their results are numbers of calls."""
    stop = threading.Event()

    def work(number: int) -> int:
        calls = 0
        with httpx.Client(base_url=url, timeout=20) as client:
            while not stop.is_set():
                calls += 1
                if send(client, number + clients * calls):
                    break
        return calls

    with ThreadPoolExecutor(clients) as threads:
        futures = [threads.submit(work, number) for number in range(clients)]
        try:
            yield futures
        finally:
            stop.set()


def test_reloads_under_load(bundle: Bundle, other: Bundle, broken: Path, current: Callable[[Path], Path]) -> None:
    seen: set[str] = set()
    with process(current(bundle.path)) as (child, url):
        with httpx.Client(base_url=url) as client:
            first = [predict(client, seed) for seed in range(4)]

        def send(client: httpx.Client, number: int) -> bool:
            body = predict(client, number % 4)
            version, expected = body["model"]["version"], first[number % 4]
            seen.add(version)
            factor = 1 if version == bundle.manifest.version else 2
            assert body["logits"] == pytest.approx([factor * z for z in expected["logits"]], rel=1e-3, abs=1e-3)
            assert body["calibrated_logits"] == pytest.approx(expected["calibrated_logits"], rel=1e-3, abs=1e-3)
            check_map(client, body)
            return False

        with load(url, send) as clients:
            failed = 0
            for turn in range(RELOADS):
                bad = turn % 6 == 5
                current(broken if bad else (other, bundle)[turn % 2].path)
                child.send_signal(signal.SIGHUP)
                wait_for(lambda: metric(url, "camcal_reloads_total") == turn + 1)  # noqa: B023
                failed += bad
                assert metric(url, 'camcal_reloads_total{result="failed"}') == failed
        assert sum(future.result() for future in clients) > RELOADS
        assert seen == {bundle.manifest.version, "doubled"}
        with httpx.Client(base_url=url) as client:
            for body in first:  # their maps are still stored after all reloads
                check_map(client, body)
        assert metric(url, 'camcal_requests_total{code="5') == 0
        assert metric(url, "camcal_model_info") == 1


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigterm_under_load(bundle: Bundle, workers: str) -> None:
    with process(bundle, CAMCAL_DRAIN_S="1", CAMCAL_WORKERS=workers) as (child, url):
        with load(url, lambda client, number: predict(client, number % 4)["close"]) as clients:
            wait_for(lambda: metric(url, 'camcal_requests_total{code="200",route="/predict"') > 2 * len(clients))
            child.send_signal(signal.SIGTERM)
            assert sum(future.result() for future in clients) > len(clients)  # each stopped after `Connection: close`
        assert child.wait(10) == 0


def test_watched_folder(
    bundle: Bundle, other: Bundle, broken: Path, current: Callable[[Path], Path], caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(Settings(bundle=current(bundle.path), max_batch=1, watch=True))
    with running(app) as url:

        def version() -> str:
            return str(httpx.get(f"{url}/model").json()["version"])

        assert version() == bundle.manifest.version
        current(other.path)
        wait_for(lambda: version() == "doubled")
        assert 'version="doubled"} 1.0' in httpx.get(f"{url}/metrics").text
        current(broken)
        wait_for(lambda: metric(url, 'camcal_reloads_total{result="failed"}') == 1)
        assert "reload failed" in caplog.text
        assert httpx.get(f"{url}/health/ready").json()["model"]["version"] == "doubled"
        current(bundle.path)
        wait_for(lambda: version() == bundle.manifest.version)


def test_watched_folder_that_changed_before_it_was_watched(
    bundle: Bundle, other: Bundle, current: Callable[[Path], Path]
) -> None:
    folder = current(bundle.path)
    app = create_app(
        Settings(bundle=folder, max_batch=1, watch=True), session.Session(Bundle.load(folder), max_batch=1)
    )
    current(other.path)
    with running(app) as url:
        wait_for(lambda: httpx.get(f"{url}/model").json()["version"] == "doubled")


def test_bundle_that_changes_while_it_is_loaded(
    bundle: Bundle, other: Bundle, current: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = current(bundle.path)
    verified = Bundle.load

    def then_replaced(path: Path | str, **options: Any) -> Bundle:
        loaded = verified(path, **options)
        current(other.path)
        return loaded

    monkeypatch.setattr(Bundle, "load", then_replaced)
    with pytest.raises(BundleError, match="was changed: its sha256 is"):
        session.load_sessions(Settings(bundle=folder, max_batch=1))


def test_map_outlives_a_model_with_more_classes(client: TestClient, bundle: Bundle) -> None:
    body = client.post("/predict?top_k=10", content=png(), headers=RAW).json()
    runtime = client.app.state.runtime  # type: ignore[attr-defined]  # any ASGI app
    fewer = bundle.manifest.model_copy(update={"classes": bundle.manifest.classes[:2]})
    object.__setattr__(runtime.model, "manifest", fewer)
    for row in body["predictions"]:
        params = {"format": "json", "class": row["class_id"]}
        numbers = client.get(body["cam"]["url"], params=params).json()
        assert numbers["label"] == row["label"]


def test_reload_keeps_the_cpu_count_of_the_start(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "usable_cpus", lambda: 2)
    app = create_app(Settings(bundle=bundle.path))
    with TestClient(app) as client:
        before = app.state.runtime.model
        monkeypatch.setattr(session, "usable_cpus", lambda: 1)
        assert client.portal is not None
        client.portal.call(app.state.runtime.served.reload)
        after = app.state.runtime.model
        assert after is not before and len(after.runs) == len(before.runs) == 2
        assert predict(client, 0)


def test_reload_to_another_device_is_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(Settings(bundle=bundle.path, intra_threads=2))
    with TestClient(app) as client:
        before = app.state.runtime.model

        def padded(settings: Settings, proofs: Proofs) -> Model:  # as on a GPU: one lane
            return Model((session.Session(bundle, device="cpu", pad=True, max_batch=settings.max_batch),))

        monkeypatch.setattr(served, "load_model", padded)
        assert client.portal is not None
        client.portal.call(app.state.runtime.served.reload)
        assert app.state.runtime.model is before and "restart the server to use it" in caplog.text
        assert predict(client, 0)


def test_reload_frees_the_first_model(bundle: Bundle) -> None:
    sessions = [session.Session(bundle, device="cpu", max_batch=1)]
    first = weakref.ref(sessions[0])
    app = create_app(Settings(bundle=bundle.path, max_batch=1), sessions.pop())
    with TestClient(app) as client:
        assert client.portal is not None and first() is not None
        client.portal.call(app.state.runtime.served.reload)
        gc.collect()
        assert first() is None


def test_waiting_reloads_are_merged(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, started = threading.Event(), list[Settings]()
    app = create_app(Settings(bundle=bundle.path, max_batch=1))
    with TestClient(app) as client:

        def slowly(settings: Settings, proofs: Proofs) -> Model:
            started.append(settings)
            assert gate.wait(60)
            return Model((session.Session(bundle, max_batch=1),))

        monkeypatch.setattr(served, "load_model", slowly)
        assert client.portal is not None
        reloads = [client.portal.start_task_soon(app.state.runtime.served.reload) for _ in range(5)]
        wait_for(lambda: len(started) == 1 and sum(reload.done() for reload in reloads) == 3)
        gate.set()
        for reload in reloads:
            reload.result(60)
        assert len(started) == 2


def test_manifest_that_changes_while_its_graph_is_loaded(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hostile.make(bundle.path, tmp_path / "bundle", lambda folder: None)
    prove = session.Session.prove

    def then_changed(self: session.Session) -> None:
        prove(self)
        hostile.edit(folder, lambda manifest: manifest.update(version="other"))

    monkeypatch.setattr(session.Session, "prove", then_changed)
    with pytest.raises(BundleError, match="changed while it was loaded"):
        session.load_sessions(Settings(bundle=folder, max_batch=1))
