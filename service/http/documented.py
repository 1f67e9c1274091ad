"""What the OpenAPI document says of errors and bodies, said once for every route."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from camcal.service.http.errors import KINDS, PROBLEM_JSON

Responses = dict[int | str, dict[str, Any]]

_HEADERS = {
    401: {"WWW-Authenticate": {"schema": {"type": "string"}}},
    429: {"Retry-After": {"description": "Seconds until there should be room.", "schema": {"type": "integer"}}},
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
    """The same for routes of the Open Inference Protocol, with its form of errors."""
    schema = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": {"application/json": {"schema": schema}}}
        for status in statuses
    }


def header(description: str) -> dict[str, Any]:
    """A response header that is a string."""
    return {"description": description, "schema": {"type": "string"}}


def binary(*media_types: str) -> dict[str, Any]:
    """The `content` of a body of bytes in one of `media_types`."""
    return {kind: {"schema": {"type": "string", "format": "binary"}} for kind in media_types}
