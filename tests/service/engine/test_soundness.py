"""A model that passes every check at load, but has NaN outputs for a white image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from camcal.models.bundle import Bundle
from camcal.service.command.offline import predict_files
from camcal.service.engine.decoding import Limits
from camcal.service.engine.ranking import Ranker
from camcal.service.engine.session import Session, load_session
from camcal.service.engine.soundness import MAX_FAILURES
from camcal.service.http.app import create_app
from camcal.service.settings import Settings
from tests.service import hostile
from tests.service.conftest import ClientFactory, TestClient, encoded, png
from tests.service.http.routes.test_predict import RAW, problem
from tests.service.test_live import wait_for

WHITE = encoded(Image.new("RGB", (40, 40), "white"))


@pytest.fixture
def client(client_factory: ClientFactory, bundle: Bundle, tmp_path: Path) -> TestClient:
    folder = hostile.make(bundle.path, tmp_path / "bundle", hostile.white_is_not_finite)
    return client_factory(load_session(Settings(bundle=folder, max_batch=2, intra_threads=1)))


def metrics(client: TestClient) -> str:
    text: str = client.get("/metrics").text
    assert " NaN" not in text
    return text


def test_nan_output(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    response = client.post("/predict?logits=all", content=WHITE, headers=RAW)
    problem(response, 500, "internal")
    assert "invalid model outputs for 1 of 1 images: logits is not finite" in caplog.text
    assert 'camcal_model_failures_total{reason="answer"} 1.0' in metrics(client)
    assert client.post("/predict", content=png(), headers=RAW).status_code == 200


def test_nan_output_fails_alone(client: TestClient) -> None:
    images = [("image", (f"{k}.png", data, "image/png")) for k, data in enumerate((png(), WHITE, png(1)))]
    first, second, third = client.post("/predict/batch", files=images).json()["results"]
    assert first["predictions"] and third["predictions"]
    assert second["status"] == 500


def test_nan_output_under_v2(client: TestClient, bundle: Bundle) -> None:
    size = bundle.manifest.preprocessing.input_size
    pixels = {"name": "images", "datatype": "UINT8", "shape": [1, size, size, 3], "data": [255] * (3 * size**2)}
    response = client.post(f"/v2/models/{bundle.manifest.name}/infer", json={"inputs": [pixels]})
    assert response.status_code == 500 and set(response.json()) == {"error"}


def test_images_that_the_model_fails_on_do_not_stop_the_service(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    """A client with such an image must not be able to take the service down."""
    for _ in range(3 * MAX_FAILURES):
        assert client.post("/predict", content=WHITE, headers=RAW).status_code == 500
    wait_for(lambda: client.get("/health/ready").status_code == 200)
    assert client.get("/health/live").status_code == 200
    assert "a test image succeeds" in caplog.text


def test_errors_after_inference_make_the_service_unready(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Ranker.rank

    def broken(*args: Any, **options: Any) -> Any:
        raise IndexError("no such class")

    app = create_app(Settings(bundle=session.bundle.path, max_batch=session.max_batch), session)
    with TestClient(app, raise_server_exceptions=False) as client:
        monkeypatch.setattr(Ranker, "rank", broken)
        for count in range(MAX_FAILURES):
            assert client.get("/health/ready").status_code == 200, count
            problem(client.post("/predict", content=png(), headers=RAW), 500, "internal")
        wait_for(lambda: f'{{reason="after"}} {MAX_FAILURES + 1}.0' in metrics(client))
        wait_for(lambda: client.get("/health/ready").status_code == 503)
        assert client.get("/health/live").status_code == 503
        monkeypatch.setattr(Ranker, "rank", rank)
        assert client.post("/predict", content=png(), headers=RAW).status_code == 200
        assert client.get("/health/ready").status_code == 200


def test_nan_output_offline(bundle: Bundle, tmp_path: Path) -> None:
    folder = hostile.make(bundle.path, tmp_path / "bundle", hostile.white_is_not_finite)
    session = load_session(Settings(bundle=folder, max_batch=2, intra_threads=1))
    (tmp_path / "white.png").write_bytes(WHITE)
    (tmp_path / "good.png").write_bytes(png())
    limits = Limits(max_bytes=10**6, max_pixels=10**6)
    files = [tmp_path / name for name in ("good.png", "white.png")]
    good, white = predict_files(session, files, top_k=1, prior="balanced", limits=limits)
    assert good.error is None and np.isfinite(good.rows[0]["probability"])
    assert white.error == "the model failed: logits is not finite"
