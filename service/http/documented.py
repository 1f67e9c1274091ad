"""The parts of the OpenAPI document that routes share: tags, error responses, headers and binary bodies."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from camcal.service.http.errors import KINDS, PROBLEM_JSON

Responses = dict[int | str, dict[str, Any]]

TAGS = [
    {"name": "predict", "description": "Classify images."},
    {"name": "heatmaps", "description": "Heatmaps of predictions."},
    {"name": "model", "description": "The served model."},
    {"name": "operations", "description": "Health and metrics."},
    {"name": "v2", "description": "Open Inference Protocol v2, for clients of Triton and KServe."},
]

_HEADERS = {
    401: {"WWW-Authenticate": {"schema": {"type": "string"}}},
    429: {"Retry-After": {"description": "Seconds to wait before the next request.", "schema": {"type": "integer"}}},
}


def problems(*statuses: int) -> Responses:
    """The `responses` of a route for the error `statuses`."""
    return {status: _problem(status) for status in statuses}


def _problem(status: int) -> dict[str, Any]:
    kinds = [f"urn:camcal:error:{kind}" for kind, (code, _) in KINDS.items() if code == status]
    schema = {"$ref": "#/components/schemas/ProblemDetails"}
    response: dict[str, Any] = {
        "description": f"{HTTPStatus(status).phrase}: {' or '.join(kinds)}",
        "content": {PROBLEM_JSON: {"schema": schema}},
    }
    return response | ({"headers": _HEADERS[status]} if status in _HEADERS else {})


def protocol_errors(*statuses: int) -> Responses:
    """The same for routes of the Open Inference Protocol, which has its own error body."""
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/InferenceError"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of an optional parameter or form field, which can be left out but never be null."""
    match schema:
        case {"anyOf": [value, {"type": "null"}], **others}:
            return {**value, **others}
    return schema


def header(description: str) -> dict[str, Any]:
    """A response header that is a string."""
    return {"description": description, "schema": {"type": "string"}}


def binary(*media_types: str) -> dict[str, Any]:
    """The `content` of a binary body in one of `media_types`."""
    return {kind: {"schema": {"type": "string", "format": "binary"}} for kind in media_types}
