"""The OpenAPI document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from camcal.service.http import schemas
from camcal.service.http.app import create_app, openapi
from tests.service.conftest import TestClient

OPENAPI_FILE = Path(__file__).parents[3] / "openapi.yaml"


@pytest.fixture(scope="module")
def document() -> Any:
    return openapi(create_app())


def operations(document: Any) -> dict[str, Any]:
    """The operations by their ids."""
    return {operation["operationId"]: operation for path in document["paths"].values() for operation in path.values()}


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
