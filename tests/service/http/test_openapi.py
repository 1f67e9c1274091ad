"""The OpenAPI document, and the Python client that openapi-python-client generates from it."""

from __future__ import annotations

import asyncio
import importlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from fastapi import FastAPI
from openapi_python_client import generate
from openapi_python_client.config import Config, ConfigFile, MetaType
from PIL import Image

from camcal.models.bundle import Bundle
from camcal.service.engine.session import Session
from camcal.service.http import app as app_module
from camcal.service.http import schemas
from camcal.service.http.app import create_app, openapi
from camcal.service.settings import Settings
from tests.service.conftest import TestClient, png
from tests.service.test_live import running

OPENAPI_FILE = Path(__file__).parents[3] / "openapi.yaml"
PACKAGE = "generated_camcal_client"


@pytest.fixture(scope="module")
def document() -> Any:
    return openapi(create_app())


def operations(document: Any) -> dict[str, Any]:
    """The operations by their ids."""
    return {operation["operationId"]: operation for path in document["paths"].values() for operation in path.values()}


def test_concurrent_requests_share_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    app, made = create_app(), list[object]()

    def counted(app: FastAPI) -> dict[str, object]:
        made.append(app)
        return openapi(app)

    async def ask() -> set[bytes]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://camcal") as client:
            responses = await asyncio.gather(*(client.get("/openapi.json") for _ in range(8)))
        return {response.content for response in responses}

    monkeypatch.setattr(app_module, "openapi", counted)
    (content,) = asyncio.run(ask())
    assert json.loads(content)["info"]["title"] == "camcal"
    assert made == [app]


def test_openapi_file_is_the_apps(client: TestClient, document: Any) -> None:
    assert yaml.safe_load(OPENAPI_FILE.read_text()) == document, "run: python -m camcal openapi > openapi.yaml"
    assert client.get("/openapi.json").json() == document


def test_bodies_and_errors_are_documented(document: Any) -> None:
    predict, cam = (operations(document)[name] for name in ("predict", "get_cam"))
    assert set(predict["requestBody"]["content"]) == {"multipart/form-data", "image/*"}
    assert set(predict["responses"]) == set("200 400 401 403 408 413 415 422 429 500 503 504".split())
    assert set(cam["responses"]) == set("200 304 401 403 404 422 429 500 503".split())
    for operation in (predict, cam):
        assert {} in operation["security"]
        for status, response in operation["responses"].items():
            if status >= "400":
                assert set(response["content"]) == {"application/problem+json"}
    for reference in set(json.dumps(document).split('"#/components/schemas/')[1:]):
        assert reference.partition('"')[0] in document["components"]["schemas"]


def test_operation_ids_are_short_and_tagged(document: Any) -> None:
    tags = {name: operation["tags"] for name, operation in operations(document).items()}
    assert tags == {
        "predict": ["predict"],
        "predict_batch": ["predict"],
        "get_cam": ["heatmaps"],
        "delete_cam": ["heatmaps"],
        "get_model": ["model"],
        "live": ["operations"],
        "ready": ["operations"],
        "metrics": ["operations"],
        "v2_live": ["v2"],
        "v2_ready": ["v2"],
        "v2_server": ["v2"],
        "v2_model": ["v2"],
        "v2_model_ready": ["v2"],
        "v2_version": ["v2"],
        "v2_version_ready": ["v2"],
        "v2_infer": ["v2"],
        "v2_infer_version": ["v2"],
    }
    assert {tag["name"] for tag in document["tags"]} == {tag for (tag,) in tags.values()}


def test_default_format_of_a_heatmap_comes_first(document: Any) -> None:
    content = operations(document)["get_cam"]["responses"]["200"]["content"]
    assert list(content) == ["image/png", "image/webp", "image/jpeg", "application/octet-stream", "application/json"]


def test_no_parameter_is_nullable(document: Any) -> None:
    for name, operation in operations(document).items():
        for parameter in operation.get("parameters", ()):
            assert "null" not in json.dumps(parameter), name
        assert "null" not in json.dumps(operation.get("requestBody", {}).get("content", {})), name


@pytest.mark.parametrize("model", [schemas.Prediction, schemas.Contributions, schemas.ProblemDetails])
def test_examples_follow_their_schemas(model: Any) -> None:
    (example,) = model.model_config["json_schema_extra"]["examples"]
    model.model_validate(example, extra="forbid")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The generated client can be imported under this name."""
    folder = tmp_path_factory.mktemp("client")
    config = Config.from_sources(
        ConfigFile(post_hooks=[]),
        MetaType.NONE,
        document_source=OPENAPI_FILE,
        file_encoding="utf-8",
        overwrite=False,
        output_path=folder / PACKAGE,
    )
    # It cannot send a raw body of any image type, and generates the form alone.
    assert [error.detail for error in generate(config=config)] == ["Unsupported content type image/*"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield PACKAGE
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def url(session: Session) -> Iterator[str]:
    chosen = Settings(bundle=session.bundle.path, max_batch=session.max_batch, timeout_s=60)
    with running(create_app(chosen, session)) as url:
        yield url


class Api:
    """The generated client: functions of its `api`, classes of its `models`."""

    def __init__(self, package: str, client: Any):
        self._package = package
        self._client = client
        self.models: Any = importlib.import_module(f"{package}.models")
        self.file: Any = importlib.import_module(f"{package}.types").File

    def call(self, function: str, *path: str, **parameters: Any) -> Any:
        """The parsed response of `function`, named as `tag.operation`."""
        module = importlib.import_module(f"{self._package}.api.{function}")
        response = module.sync_detailed(*path, client=self._client, **parameters)
        assert response.status_code < 300 or response.parsed, response
        return response.parsed

    def upload(self, seed: int = 0) -> Any:
        return self.file(payload=io.BytesIO(png(seed)), file_name="photo.png", mime_type="image/png")


@pytest.fixture
def api(package: str, url: str) -> Iterator[Api]:
    with importlib.import_module(package).Client(base_url=url) as client:
        yield Api(package, client)


def test_generated_client_predicts_and_fetches_heatmaps(api: Api, bundle: Bundle) -> None:
    body = api.models.PredictFilesBody(image=api.upload())
    prediction = api.call("predict.predict", body=body, top_k=3, prior=api.models.PredictPrior.TRAIN)
    assert isinstance(prediction, api.models.Prediction)
    assert (len(prediction.predictions), prediction.prior) == (3, "train")
    assert prediction.probability_prior == "train"

    picture = Image.open(api.call("heatmaps.get_cam", prediction.id, size=200).payload)
    assert (picture.format, max(picture.size)) == ("PNG", 200)

    second = prediction.predictions[1].class_id
    json_format = api.models.GetCamFormat.JSON
    numbers = api.call("heatmaps.get_cam", prediction.id, class_=str(second), format_=json_format)
    heatmap = api.models.Contributions.from_dict(json.load(numbers.payload))
    assert heatmap.class_id == second
    assert (len(heatmap.contributions), len(heatmap.contributions[0])) == bundle.manifest.grid
    assert heatmap.sum_ == pytest.approx(heatmap.score, rel=1e-4, abs=1e-4)

    assert api.call("heatmaps.delete_cam", prediction.id) is None
    gone = api.call("heatmaps.get_cam", prediction.id)
    assert isinstance(gone, api.models.ProblemDetails)
    assert (gone.type_, gone.status) == ("urn:camcal:error:not-found", 404)


def test_generated_client_sends_batches(api: Api) -> None:
    body = api.models.PredictBatchBody(image=[api.upload(1), api.file(payload=io.BytesIO(b"x"), file_name="x")])
    good, bad = api.call("predict.predict_batch", body=body).results
    assert isinstance(good, api.models.Prediction)
    assert isinstance(bad, api.models.ProblemDetails)


def test_generated_client_reads_the_small_routes(api: Api, bundle: Bundle) -> None:
    assert [info.label for info in api.call("model.get_model").classes] == [c.name for c in bundle.manifest.classes]
    assert api.call("operations.live").status == "alive"
    assert api.call("operations.ready").model.version == bundle.manifest.version
    assert "camcal_ready 1.0" in api.call("operations.metrics")


def test_generated_client_speaks_the_open_inference_protocol(api: Api, bundle: Bundle) -> None:
    name, version = bundle.manifest.name, bundle.manifest.version
    metadata = api.call("v2.v2_version", name, version)
    assert metadata.versions == [version]
    shape = [1, *metadata.inputs[0].shape[1:]]
    pixels = api.models.RequestTensor(name="images", shape=shape, datatype="UINT8", data=[7] * (shape[1] ** 2 * 3))
    response = api.call("v2.v2_infer", name, body=api.models.InferenceRequest(inputs=[pixels]))
    assert (response.model_name, response.model_version) == (name, version)
    assert isinstance(api.call("v2.v2_model", "other"), api.models.InferenceError)
