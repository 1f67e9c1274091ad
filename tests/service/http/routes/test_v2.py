"""The Open Inference Protocol: by hand, and with Triton's own client."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pytest
import tritonclient.http as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from camcal.models.bundle import OUTPUTS, Bundle
from camcal.service.engine.session import Session
from camcal.service.http.inference_protocol import HEADER_LENGTH, MAX_JSON_BYTES, parse
from camcal.service.http.routes import v2
from tests.service.conftest import KEY, ClientFactory, GatedSession, TestClient, encoded, picture
from tests.service.http.routes.test_predict import RAW
from tests.service.test_live import Live as Live
from tests.service.test_live import live as live
from tests.service.test_live import wait_for

SIZE = 32  # of the digits' images


def images(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, size=(count, SIZE, SIZE, 3), dtype=np.uint8)


def infer_path(bundle: Bundle) -> str:
    return f"/v2/models/{bundle.manifest.name}/infer"


def tensor(values: NDArray[Any], **changes: Any) -> dict[str, Any]:
    whole = {"name": "images", "shape": list(values.shape), "datatype": "UINT8", "data": values.tolist()}
    return {name: value for name, value in (whole | changes).items() if value is not None}


@pytest.fixture
def server(live: Live, session: Session) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(live(session).removeprefix("http://")) as client:
        yield client


def test_triton_client_finds_the_model(server: triton.InferenceServerClient, bundle: Bundle) -> None:
    name, version = bundle.manifest.name, bundle.manifest.version
    assert server.is_server_live()
    assert server.is_server_ready()
    assert server.is_model_ready(name)
    assert server.is_model_ready(name, version)
    assert not server.is_model_ready("another")
    assert not server.is_model_ready(name, "another")
    assert server.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = server.get_model_metadata(name, version)
    assert metadata["versions"] == [version]
    assert metadata["inputs"][0] == {"name": "images", "datatype": "UINT8", "shape": [-1, SIZE, SIZE, 3]}
    assert [output["name"] for output in metadata["outputs"]] == list(OUTPUTS)


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
@pytest.mark.parametrize("count", [1, 5, 40])  # 40: more than one run
def test_triton_client_gets_what_the_session_says(
    server: triton.InferenceServerClient, session: Session, binary_in: bool, binary_out: bool | None, count: int
) -> None:
    batch, manifest = images(count), session.bundle.manifest
    pixels = triton.InferInput("images", list(batch.shape), "UINT8")
    pixels.set_data_from_numpy(batch, binary_data=binary_in)
    top_k = triton.InferInput("top_k", [1], "INT64")
    top_k.set_data_from_numpy(np.array([3], dtype=np.int64), binary_data=binary_in)
    asked = binary_out is not None
    outputs = [triton.InferRequestedOutput(name, binary_data=bool(binary_out)) for name in OUTPUTS] if asked else None
    result = server.infer(manifest.name, [pixels, top_k], outputs=outputs, request_id="mine")
    assert result.get_response()["id"] == "mine"
    assert result.get_response()["model_version"] == manifest.version
    expected = [session.run(batch[i : i + 1], top_k=3) for i in range(count)]
    for output in server.get_model_metadata(manifest.name)["outputs"]:
        name = output["name"]
        array = result.as_numpy(name)
        wanted = np.concatenate([getattr(one, name) for one in expected])
        assert array.shape == wanted.shape
        assert array.dtype == wanted.dtype
        assert all(said in (-1, found) for said, found in zip(output["shape"], array.shape, strict=True))
        np.testing.assert_allclose(array, wanted, rtol=1e-3, atol=1e-3)


def test_triton_client_is_told_what_is_wrong(server: triton.InferenceServerClient, bundle: Bundle) -> None:
    batch = images(1)[:, 1:]
    pixels = triton.InferInput("images", list(batch.shape), "UINT8")
    pixels.set_data_from_numpy(batch)
    with pytest.raises(InferenceServerException, match=r"shape \[1, 31, 32, 3\]; expected \[N, 32, 32, 3\]"):
        server.infer(bundle.manifest.name, [pixels])
    with pytest.raises(InferenceServerException, match="there is no model 'another'; this server serves"):
        server.infer("another", [pixels])
    compressed = triton.InferInput("images", [1, SIZE, SIZE, 3], "UINT8")
    compressed.set_data_from_numpy(images(1))
    with pytest.raises(InferenceServerException, match="is compressed"):
        server.infer(bundle.manifest.name, [compressed], request_compression_algorithm="gzip")


def test_agrees_with_predict(client: TestClient, bundle: Bundle) -> None:
    image = picture(size=(SIZE, SIZE))
    pixels = bundle.manifest.preprocessing.apply(image)[None]
    body = client.post(infer_path(bundle), json={"inputs": [tensor(pixels)], "outputs": [{"name": "logits"}]}).json()
    (output,) = body["outputs"]
    assert (output["name"], output["shape"], output["datatype"]) == ("logits", [1, 10], "FP32")
    predicted = client.post("/predict?logits=all", content=encoded(image), headers=RAW).json()
    np.testing.assert_allclose(output["data"], predicted["logits"], rtol=1e-3, atol=1e-3)
    text = client.get("/metrics").text
    assert 'camcal_requests_total{code="200",route="/v2/models/{name}/infer"} 1.0' in text
    assert sum(float(line.split()[1]) for line in text.splitlines() if line.startswith("camcal_predictions_total")) == 2


def test_flat_data_and_default_top_k(client: TestClient, bundle: Bundle) -> None:
    values = images(2)
    nested = client.post(infer_path(bundle), json={"inputs": [tensor(values)]}).json()
    flat = client.post(infer_path(bundle), json={"inputs": [tensor(values, data=values.ravel().tolist())]}).json()
    assert [output["name"] for output in nested["outputs"]] == list(OUTPUTS)
    shapes = {output["name"]: output["shape"] for output in flat["outputs"]}
    assert shapes["top_classes"] == [2, 5]
    assert shapes["maps"] == [2, 5, *bundle.manifest.grid]
    for one, other in zip(nested["outputs"], flat["outputs"], strict=True):
        np.testing.assert_allclose(one["data"], other["data"], rtol=1e-3, atol=1e-3)


def nested(depth: int) -> list[Any]:
    """A number in so many lists."""
    values: list[Any] = [0]
    for _ in range(depth - 1):
        values = [values]
    return values


ZEROS = np.zeros((1, SIZE, SIZE, 3), dtype=np.uint8)
TOP_K = {"name": "top_k", "shape": [1], "datatype": "INT64", "data": [2]}


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ([], "the request: it should be a valid dictionary"),
        ({}, "inputs: Field required"),
        ({"inputs": []}, "the input 'images' is missing"),
        ({"inputs": [TOP_K]}, "the input 'images' is missing"),
        ({"inputs": [{"name": "images"}]}, "inputs.0.shape: Field required"),
        ({"inputs": [tensor(ZEROS, shape=[-1])]}, "inputs.0.shape.0: it should be greater than or equal to 1"),
        ({"inputs": [tensor(ZEROS[:0])]}, "inputs.0.shape.0: it should be greater than or equal to 1"),
        ({"inputs": [tensor(ZEROS, shape=[0, 2**40, 2**40], data=[])]}, "inputs.0.shape.0: it should be"),
        ({"inputs": [tensor(ZEROS, shape=[2**63])]}, "inputs.0.shape.0: it should be less than"),
        ({"inputs": [tensor(ZEROS, data=[])]}, "3072 integers"),
        ({"inputs": [tensor(ZEROS, data=["x" * 100_000] + [""] * 3071)]}, "3072 integers"),
        ({"inputs": [tensor(ZEROS, data=[True] * 3072)]}, "3072 integers"),
        ({"inputs": [tensor(ZEROS, data=nested(200))]}, "3072 integers"),
        ({"inputs": [tensor(ZEROS, name="pixels")]}, "the input 'pixels' is unknown"),
        ({"inputs": [tensor(ZEROS), tensor(ZEROS)]}, "the input 'images' is unknown or sent twice"),
        ({"inputs": [tensor(ZEROS, datatype="FP32")]}, "the input 'images' is 'FP32'; expected UINT8"),
        ({"inputs": [tensor(ZEROS, shape=[2, SIZE, SIZE, 3])]}, "6144 integers from 0 to 255"),
        ({"inputs": [tensor(ZEROS, shape=[10**9] * 8)]}, "expected [N, 32, 32, 3] with N from 1 to 64"),
        ({"inputs": [tensor(ZEROS, shape=[])]}, "expected [N, 32, 32, 3] with N from 1 to 64"),
        ({"inputs": [tensor(ZEROS, shape=[65, SIZE, SIZE, 3], data=["no number"])]}, "has shape [65, 32, 32, 3]"),
        ({"inputs": [tensor(ZEROS, shape=[3072])]}, "has shape [3072]; expected [N, 32, 32, 3]"),
        ({"inputs": [tensor(np.repeat(ZEROS, 65, axis=0))]}, "with N from 1 to 64"),
        ({"inputs": [tensor(ZEROS, data=[256] * 3072)]}, "integers from 0 to 255"),
        ({"inputs": [tensor(ZEROS, data=[0.5] * 3072)]}, "integers"),
        ({"inputs": [tensor(ZEROS, data=[[0], [0, 1]])]}, "integers"),
        ({"inputs": [tensor(ZEROS, data=[[0] * 3071, [0]])]}, "integers"),
        ({"inputs": [tensor(ZEROS, data=[2**63] * 3072)]}, "integers"),
        ({"inputs": [tensor(ZEROS, data=["a"] * 3072)]}, "integers"),
        ({"inputs": [tensor(ZEROS, data=None)]}, "needs either data or a binary_data_size within the 0 bytes"),
        ({"inputs": [tensor(ZEROS, parameters={"binary_data_size": 3072})]}, "needs either data or"),
        ({"inputs": [tensor(ZEROS), TOP_K | {"data": [0]}]}, "top_k is 0"),
        ({"inputs": [tensor(ZEROS), TOP_K | {"data": [2, 3], "shape": [2]}]}, "'top_k' has shape [2]; expected [1]"),
        ({"inputs": [tensor(ZEROS)], "outputs": [{"name": "nope"}]}, "the model has no output 'nope'; it has logits"),
    ],
)
def test_bad_requests(client: TestClient, bundle: Bundle, request_: Any, said: str) -> None:
    response = client.post(infer_path(bundle), content=orjson.dumps(request_))
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    assert said in response.json()["error"]


@pytest.mark.parametrize(
    ("length", "size", "said"),
    [
        ("x", 3072, f"{HEADER_LENGTH} is 'x'"),
        ("999999", 3072, "expected at most the body's"),
        ("9" * 5000, 3072, "expected at most the body's"),
        (None, 3071, "has 3071 bytes; its shape [1, 32, 32, 3] needs 3072"),
        (None, 99999, "within the 3072 bytes that follow"),
        (None, 0, "3072 bytes after the JSON belong to no input"),
    ],
)
def test_bad_binary_requests(client: TestClient, bundle: Bundle, length: str | None, size: int, said: str) -> None:
    inputs = [tensor(ZEROS, data=None, parameters={"binary_data_size": size})]
    if size == 0:
        inputs = [tensor(ZEROS)]
    head = orjson.dumps({"inputs": inputs})
    tail = bytes(min(size, 3072) or 3072)
    response = client.post(
        infer_path(bundle), content=head + tail, headers={HEADER_LENGTH: str(len(head)) if length is None else length}
    )
    assert response.status_code == 400
    assert said in response.json()["error"]


def test_other_errors_have_the_protocols_form(client_factory: ClientFactory, bundle: Bundle) -> None:
    client = client_factory(api_key=KEY, max_body_bytes=1000)
    key = {"X-API-Key": KEY}
    path = infer_path(bundle)
    for response, status in (
        (client.get("/v2/nope"), 404),
        (client.get(path, headers=key), 405),
        (client.post(path, json={}), 401),
        (client.get(f"/v2/models/{bundle.manifest.name}"), 401),
        (client.post(path, content=b"{", headers=key), 400),
        (client.post(path, content=bytes(1001), headers=key), 413),
        (client.post(path, content=b"{}", headers=key | {"X-Request-Timeout-Ms": "x"}), 422),
    ):
        assert response.status_code == status
        assert list(response.json()) == ["error"]
    assert client.get("/v2").json()["name"] == "camcal"
    client.app.state.runtime.drain()  # type: ignore[attr-defined]  # any ASGI app
    for path in ("/v2/health/ready", f"/v2/models/{bundle.manifest.name}/ready"):
        assert "draining" in client.get(path, headers=key).json()["error"]
    assert client.get("/v2/health/live").json() == {"live": True}


def test_large_json_is_refused(client: TestClient, bundle: Bundle) -> None:
    response = client.post(infer_path(bundle), content=b" " * (2**20 + 1))
    assert response.status_code == 413
    assert response.json()["error"] == "the JSON has 1048577 bytes; the limit is 1048576: send binary tensors"


def test_too_many_maps_are_refused(client: TestClient, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(v2, "MAX_MAP_VALUES", 3 * 10 * math.prod(bundle.manifest.grid) - 1)
    for count, status in ((2, 200), (3, 400)):
        request = {
            "inputs": [tensor(images(count)), {"name": "top_k", "shape": [1], "datatype": "INT64", "data": [10]}]
        }
        response = client.post(infer_path(bundle), json=request)
        assert response.status_code == status, response.text
    assert response.json()["error"].startswith("the maps of 10 classes of 3 images have ")


def test_one_image_of_any_size_is_never_too_long() -> None:
    pixels = np.full((1, 512, 512, 3), 255, dtype=np.uint8)
    body = bytearray(json.dumps({"inputs": [tensor(pixels)]}).encode())
    assert len(body) > MAX_JSON_BYTES
    np.testing.assert_array_equal(parse(body, None, 512, 1).images, pixels)


def test_infer_shares_batches_with_predict(
    client_factory: ClientFactory, gated: GatedSession, bundle: Bundle, submitted: list[object]
) -> None:
    client = client_factory(gated, queue_limit=9, client_share=1)
    gated.sizes.clear()
    gated.close()
    done: list[int] = []

    def post(*what: Any, **how: Any) -> threading.Thread:
        thread = threading.Thread(target=lambda: done.append(client.post(*what, **how).status_code))
        thread.start()
        return thread

    first = post("/predict", content=encoded(picture()), headers=RAW)
    assert gated.waiting.acquire(timeout=10)
    others = [
        post("/predict", content=encoded(picture()), headers=RAW),
        post(infer_path(bundle), json={"inputs": [tensor(images(3))], "outputs": [{"name": "top_classes"}]}),
    ]
    admission = client.app.state.runtime.admission  # type: ignore[attr-defined]  # any ASGI app
    wait_for(lambda: len(submitted) == 5)
    assert admission.depth == 4
    refused = client.post(infer_path(bundle), json={"inputs": [tensor(images(6))]})
    assert (refused.status_code, list(refused.json())) == (429, ["error"])
    assert int(refused.headers["retry-after"]) >= 1
    gated.open()
    for thread in (first, *others):
        thread.join(10)
    assert done == [200] * 3
    assert gated.sizes == [1, 4]


def test_failing_model(client_factory: ClientFactory, gated: GatedSession, bundle: Bundle, caplog: Any) -> None:
    client = client_factory(gated)
    request = {"inputs": [tensor(images(3))]}
    gated.failing = True
    failed = client.post(infer_path(bundle), json=request)
    assert (failed.status_code, failed.json()) == (
        500,
        {"error": "the request failed; see the service's log"},
    )
    assert "inference failed on a batch" in caplog.text
    gated.failing = False
    assert client.post(infer_path(bundle), json=request).status_code == 200


def test_bytes_and_json_in_one_response(client: TestClient, bundle: Bundle) -> None:
    head = orjson.dumps(
        {
            "inputs": [tensor(images(2), data=None, parameters={"binary_data_size": 6144})],
            "outputs": [{"name": "maps", "parameters": {"binary_data": True}}, {"name": "top_classes"}],
        }
    )
    response = client.post(
        infer_path(bundle), content=head + images(2).tobytes(), headers={HEADER_LENGTH: str(len(head))}
    )
    assert response.headers["content-type"] == "application/octet-stream"
    length = int(response.headers[HEADER_LENGTH])
    maps, top_classes = orjson.loads(response.content[:length])["outputs"]
    assert maps["parameters"] == {"binary_data_size": len(response.content) - length}
    assert "data" not in maps
    assert len(top_classes["data"]) == 10
    values = np.frombuffer(response.content[length:], dtype="<f4").reshape(maps["shape"])
    assert np.isfinite(values).all()
