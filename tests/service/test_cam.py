"""`GET /cam/{id}`, good and bad, through HTTP."""

from __future__ import annotations

import io
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.bundle import Bundle
from tests.service.conftest import ClientFactory, TestClient, png
from tests.service.test_predict import RAW, problem


def predict(client: TestClient, query: str = "", seed: int = 0, size: tuple[int, int] = (60, 40)) -> dict[str, Any]:
    body: dict[str, Any] = client.post(f"/predict?{query}", content=png(seed, size), headers=RAW).json()
    return body


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("prior", ["balanced", "train"])
def test_contributions_sum_to_the_served_score(
    client: TestClient, bundle: Bundle, prior: str, calibrated: bool
) -> None:
    for seed in range(4):
        body = predict(client, f"top_k=10&prior={prior}", seed)
        for prediction in body["predictions"]:
            params = {"class": prediction["class_id"], "calibrated": calibrated, "format": "json"}
            found = client.get(body["cam"]["url"], params=params).json()
            served = prediction["calibrated_logit" if calibrated else "logit"]
            contributions = np.array(found["contributions"])
            assert contributions.shape == bundle.manifest.grid
            # A score near 0 is a difference of large contributions: then their size is the scale.
            assert contributions.sum() == pytest.approx(served, rel=1e-4, abs=1e-5 * np.abs(contributions).sum())
            assert found["sum"] == pytest.approx(contributions.sum(), rel=1e-6, abs=1e-6)
            assert found["score"] == served
            assert (found["class_id"], found["label"]) == (prediction["class_id"], prediction["label"])
            assert found["calibrated"] is calibrated


def test_train_prior_has_the_maps_of_its_own_classes(client: TestClient) -> None:
    for seed in range(8):
        body = predict(client, "top_k=1&prior=train", seed)
        found = client.get(body["cam"]["url"], params={"format": "json"}).json()
        assert found["class_id"] == body["predictions"][0]["class_id"]
        assert found["score"] == body["predictions"][0]["calibrated_logit"]


def test_npy_holds_the_same(client: TestClient) -> None:
    body = predict(client)
    response = client.get(body["cam"]["url"], params={"format": "npy"})
    assert response.headers["content-type"] == "application/octet-stream"
    numbers = client.get(body["cam"]["url"], params={"format": "json"}).json()["contributions"]
    np.testing.assert_array_equal(np.load(io.BytesIO(response.content)), np.array(numbers, dtype=np.float32))


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
@pytest.mark.parametrize("query", ["", "overlay=false&colormap=viridis", "alpha=0&colormap=gray", "calibrated=false"])
def test_pictures(client: TestClient, format: str, query: str) -> None:
    body = predict(client, size=(90, 60))
    response = client.get(f"{body['cam']['url']}?size=128&format={format}&{query}")
    assert response.headers["content-type"] == f"image/{format}"
    with Image.open(io.BytesIO(response.content)) as image:
        assert (image.format, image.size, image.mode) == (format.upper(), (128, 128), "RGB")


def test_class_by_index_or_label(client: TestClient) -> None:
    body = predict(client)
    last = body["predictions"][-1]
    for wanted in (last["class_id"], last["label"]):
        found = client.get(body["cam"]["url"], params={"class": wanted, "format": "json"}).json()
        assert found["class_id"] == last["class_id"]


def test_etag(client: TestClient) -> None:
    url = predict(client)["cam"]["url"]
    first = client.get(url)
    etag = first.headers["etag"]
    assert client.get(url).headers["etag"] == etag
    assert client.get(url, params={"alpha": 0.1}).headers["etag"] != etag
    for tag in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        again = client.get(url, headers={"If-None-Match": tag})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == etag
    assert client.get(url, headers={"If-None-Match": '"other"'}).status_code == 200


def test_cached_to_the_end_of_its_life(client: TestClient) -> None:
    control = client.get(predict(client)["cam"]["url"]).headers["cache-control"]
    privacy, _, age = control.partition(", max-age=")
    assert privacy == "private"
    assert 590 <= int(age) <= 600


@pytest.mark.parametrize("id", ["abc", "a" * 22, "a" * 23, "..%2F..%2Fetc%2Fpasswd", "%00"])
def test_unknown_or_malformed_id(client: TestClient, id: str) -> None:
    problem(client.get(f"/cam/{id}"), 404, "not-found")


def test_expired_id(client_factory: ClientFactory) -> None:
    client = client_factory(cam_ttl_s=0.05)
    url = predict(client)["cam"]["url"]
    time.sleep(0.06)
    assert "its life of 0.05 s is over" in problem(client.get(url), 404, "not-found")


def test_evicted_id(client_factory: ClientFactory) -> None:
    client = client_factory(cam_max_bytes=8000)
    urls = [predict(client, "top_k=1", seed)["cam"]["url"] for seed in range(12)]
    problem(client.get(urls[0]), 404, "not-found")
    assert client.get(urls[-1]).status_code == 200


@pytest.mark.parametrize("wanted", ["nope", "11", "-1", "", "٣", "9" * 500])
def test_class_without_a_map(client: TestClient, wanted: str) -> None:
    body = predict(client, "top_k=1")
    detail = problem(client.get(body["cam"]["url"], params={"class": wanted}), 422, "invalid-parameter")
    assert f"this prediction kept {body['predictions'][0]['class_id']} (" in detail
    assert "larger top_k" in detail


@pytest.mark.parametrize(
    "query",
    ["size=15", "size=1025", "size=x", "alpha=1.1", "alpha=nan", "colormap=jet", "format=svg", "calibrated=2"],
)
def test_bad_parameter(client: TestClient, query: str) -> None:
    response = client.get(f"{predict(client)['cam']['url']}?{query}")
    assert problem(response, 422, "invalid-parameter").startswith(f"{query.partition('=')[0]} is ")


def test_store_that_fails_is_a_lost_heatmap(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        async def put(self, key: str, value: bytes, ttl_s: float) -> None:
            raise ConnectionError

        async def get(self, key: str) -> bytes | None:
            raise ConnectionError

        async def close(self) -> None: ...

    url = predict(client)["cam"]["url"]
    monkeypatch.setattr(client.app.state.runtime, "store", Broken())  # type: ignore[attr-defined]  # any ASGI app
    problem(client.get(url), 404, "not-found")
    assert predict(client)["cam"] is None
    text = client.get("/metrics").text
    assert 'camcal_cam_store_failures_total{operation="get"} 1.0' in text
    assert 'camcal_cam_store_failures_total{operation="put"} 1.0' in text
