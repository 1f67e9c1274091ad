"""`POST /predict/batch`: in order, and a bad image fails alone."""

from __future__ import annotations

import threading

import pytest

from camcal.service.http.routes import batch
from tests.service.conftest import ClientFactory, GatedSession, TestClient, encoded, picture, png
from tests.service.http.routes.test_predict import RAW, problem
from tests.service.test_live import wait_for


def files(*images: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("image", (f"{i}.png", data)) for i, data in enumerate(images)]


def test_answers_are_those_of_predict_in_order(client: TestClient) -> None:
    alone = [client.post("/predict?top_k=3", content=png(seed), headers=RAW).json() for seed in range(9)]
    results = client.post("/predict/batch?top_k=3", files=files(*map(png, range(9)))).json()["results"]
    for one, expected in zip(results, alone, strict=True):
        assert list(one) == list(expected)
        assert [p["class_id"] for p in one["predictions"]] == [p["class_id"] for p in expected["predictions"]]
        for mine, its in zip(one["predictions"], expected["predictions"], strict=True):
            assert mine["calibrated_logit"] == pytest.approx(its["calibrated_logit"], rel=1e-3, abs=1e-3)
        numbers = client.get(one["cam"]["url"], params={"format": "json"}).json()
        assert numbers["sum"] == pytest.approx(one["predictions"][0]["calibrated_logit"], rel=1e-4, abs=1e-4)
    assert len({one["id"] for one in results}) == 9


def test_bad_image_fails_alone(client_factory: ClientFactory) -> None:
    client = client_factory(max_bytes=5000, max_pixels=10_000)
    jpeg = encoded(picture(), "JPEG")
    bad = [(b"hello", 415), (b"", 400), (jpeg[: len(jpeg) // 2], 422), (bytes(5001), 413), (png(0, (200, 200)), 413)]
    response = client.post("/predict/batch", files=files(png(1), *(data for data, _ in bad), png(2)))
    assert response.status_code == 200
    first, *problems, last = response.json()["results"]
    assert len(first["predictions"]) == len(last["predictions"]) == 5
    assert [problem["status"] for problem in problems] == [status for _, status in bad]
    for problem_ in problems:
        assert problem_["type"].startswith("urn:camcal:error:")
        assert problem_["detail"]
    assert "camcal_queue_depth 0.0" in client.get("/metrics").text


def test_images_share_runs(client_factory: ClientFactory, gated: GatedSession) -> None:
    client = client_factory(gated, decode_threads=1)
    gated.sizes.clear()
    gated.close()
    batcher = client.app.state.runtime.served.batcher  # type: ignore[attr-defined]  # any ASGI app

    def let_go() -> None:
        assert gated.waiting.acquire(timeout=10)
        wait_for(lambda: len(batcher._waiting) == 19)
        gated.open()

    opener = threading.Thread(target=let_go)
    opener.start()
    assert len(client.post("/predict/batch", files=files(*map(png, range(20)))).json()["results"]) == 20
    opener.join(10)
    assert sum(gated.sizes) == 20 and gated.sizes[0] == 1 and len(gated.sizes) < 20


def test_failing_model_fails_each_image(
    client_factory: ClientFactory, gated: GatedSession, caplog: pytest.LogCaptureFixture
) -> None:
    client = client_factory(gated)
    gated.failing = True
    results = client.post("/predict/batch", files=files(png(1), b"hello", png(2))).json()["results"]
    gated.failing = False
    assert [result["status"] for result in results] == [500, 415, 500]
    assert "boom" not in str(results)
    assert "inference failed on a batch" in caplog.text
    assert len(client.post("/predict/batch", files=files(png(1))).json()["results"]) == 1


def test_deadline_of_a_batch(client_factory: ClientFactory, gated: GatedSession) -> None:
    client = client_factory(gated)
    batcher = client.app.state.runtime.served.batcher  # type: ignore[attr-defined]  # any ASGI app
    gated.close()

    def let_go() -> None:
        assert gated.waiting.acquire(timeout=10)
        wait_for(lambda: len(batcher._waiting) == 4)
        wait_for(lambda: not batcher._waiting)
        gated.open()

    opener = threading.Thread(target=let_go)
    opener.start()
    headers = {"X-Request-Timeout-Ms": "1000"}
    results = client.post("/predict/batch", files=files(*map(png, range(5))), headers=headers).json()["results"]
    opener.join(10)
    assert sum("predictions" in result for result in results) == 1
    assert [result["status"] for result in results if "predictions" not in result] == [504] * 4


@pytest.mark.parametrize("field", ["max_images", "queue_limit"])
def test_too_many_images(client_factory: ClientFactory, field: str) -> None:
    client = client_factory(**{field: 3, "client_share": 1})
    assert len(client.post("/predict/batch", files=files(*map(png, range(3)))).json()["results"]) == 3
    for count, said in (
        (4, "the form has 4 images; the limit is 3, the smaller of CAMCAL_MAX_IMAGES and"),
        (40, "more than 18 parts"),
    ):
        response = client.post("/predict/batch", files=files(*map(png, range(count))))
        assert said in problem(response, 400, "malformed-request")


def test_too_many_predictions(client_factory: ClientFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MAX_CLASSES", 29)
    client = client_factory()
    assert client.post("/predict/batch?top_k=10", files=files(*map(png, range(2)))).status_code == 200
    response = client.post("/predict/batch?top_k=10", files=files(*map(png, range(3))))
    said = problem(response, 422, "invalid-parameter")
    assert said.startswith("10 classes of 3 images are 30 predictions; the limit per response is 29")


def test_too_large_form(client_factory: ClientFactory) -> None:
    client = client_factory(max_body_bytes=1000)
    response = client.post("/predict/batch", files=files(bytes(1001)))
    assert "the limit of 1000 bytes (CAMCAL_MAX_BODY_BYTES)" in problem(response, 413, "too-large")


def test_no_room_for_all_images(client_factory: ClientFactory, gated: GatedSession) -> None:
    client = client_factory(gated, queue_limit=4, client_share=1)
    client.app.state.runtime.admission.depth = 2  # type: ignore[attr-defined]  # any ASGI app
    response = client.post("/predict/batch", files=files(*map(png, range(3))))
    problem(response, 429, "queue-full")
    assert client.app.state.runtime.admission.depth == 2  # type: ignore[attr-defined]
    assert client.post("/predict/batch", files=files(*map(png, range(2)))).status_code == 200


def test_other_bodies_are_refused(client: TestClient) -> None:
    detail = problem(client.post("/predict/batch", content=png(), headers=RAW), 415, "unsupported-format")
    assert "one or more files in the field `image`" in detail
    detail = problem(client.post("/predict/batch", files={"picture": png()}), 400, "malformed-request")
    assert detail == "expected a file in the field 'image'; the form has 'picture'"
    problem(client.post("/predict/batch?top_k=11", files=files(png())), 422, "invalid-parameter")
