"""Converts exceptions into `application/problem+json` responses (RFC 9457)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from camcal.service.engine.admission import QueueFullError
from camcal.service.engine.batching import ClosedError, InferenceError
from camcal.service.engine.deadline import DeadlineError
from camcal.service.engine.decoding import ImageTooLargeError, UndecodableImageError, UnsupportedFormatError
from camcal.service.engine.large import DecoderError
from camcal.service.http.rates import RateLimitError
from camcal.service.metrics import Metrics
from camcal.service.settings import sentence

PROBLEM_JSON = "application/problem+json"

# kind → (status, title). `urn:camcal:error:<kind>` is the problem's `type`: stable, for programs.
KINDS: dict[str, tuple[int, str]] = {
    "malformed-request": (400, "Malformed request"),
    "unauthorized": (401, "Missing or invalid API key"),
    "forbidden": (403, "Forbidden"),
    "not-found": (404, "Not found"),
    "method-not-allowed": (405, "Method not allowed"),
    "body-timeout": (408, "Request body timeout"),
    "too-large": (413, "Image or request body too large"),
    "unsupported-format": (415, "Unsupported format"),
    "undecodable-image": (422, "Image cannot be decoded"),
    "invalid-parameter": (422, "Invalid parameter"),
    "unknown-host": (421, "Unknown host"),
    "queue-full": (429, "Queue full"),
    "rate-limited": (429, "Too many requests"),
    "too-many-attempts": (429, "Too many invalid API keys"),
    "client-gone": (499, "Client disconnected"),
    "internal": (500, "Internal error"),
    "not-ready": (503, "Service not ready"),
    "out-of-memory": (503, "Out of memory"),
    "deadline-passed": (504, "Deadline exceeded"),
}

SHOWN = 20  # maximum number of invalid fields in one response

_REJECTIONS = {
    "rate-limited": "rate_limited",
    "deadline-passed": "deadline",
    "not-ready": "not_ready",
    "out-of-memory": "memory",
}


@dataclass(eq=False)
class Problem(Exception):
    """An error response: `kind` is a key of KINDS, `detail` a sentence, `errors` the invalid fields."""

    kind: str
    detail: str
    headers: dict[str, str] = field(default_factory=dict)
    errors: list[dict[str, str]] = field(default_factory=list)

    @property
    def status(self) -> int:
        return KINDS[self.kind][0]

    def body(self) -> dict[str, Any]:
        """The members of RFC 9457, and `errors` if fields are invalid."""
        status, title = KINDS[self.kind]
        body = {"type": f"urn:camcal:error:{self.kind}", "title": title, "status": status, "detail": self.detail}
        return body | ({"errors": self.errors} if self.errors else {})

    def response(self, scope: Scope) -> Response:
        """The response to the request of `scope`; under /v2 in the format of the Open Inference Protocol."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path == "/v2" or path.startswith("/v2/"):
            return Response(orjson.dumps({"error": self.detail}), self.status, self.headers, "application/json")
        return Response(orjson.dumps(self.body()), self.status, self.headers, PROBLEM_JSON)


def bad_parameter(name: str, message: str, where: str = "query") -> Problem:
    """An invalid parameter; `message` is a sentence that names it and the accepted values."""
    return Problem("invalid-parameter", message, errors=[{"in": where, "field": name, "message": message}])


def problem_of(error: Exception) -> Problem:
    """The problem for `error`. An unexpected exception becomes `internal`, without details."""
    match error:
        case Problem():
            return error
        case UnsupportedFormatError():
            return Problem("unsupported-format", str(error))
        case ImageTooLargeError():
            return Problem("too-large", str(error))
        case UndecodableImageError():
            return Problem("undecodable-image", str(error))
        case QueueFullError():
            headers = {"Retry-After": str(error.retry_after_s)}
            if error.reason.endswith("_bytes"):
                headers["Connection"] = "close"  # the client is still sending the body
            return Problem("queue-full", str(error), headers)
        case RateLimitError():
            return Problem("rate-limited", str(error), {"Retry-After": str(error.retry_after_s)})
        case DeadlineError():
            return Problem("deadline-passed", "the request was not processed in time; try again later")
        case ClosedError():
            return Problem("not-ready", str(error))
        case MemoryError():
            message = "not enough memory for this request; try again later"
            return Problem("out-of-memory", message, {"Retry-After": "1"})
        case DecoderError():
            return Problem("not-ready", f"{error}; try again", {"Retry-After": "1"})
        case RequestValidationError():
            return _invalid(error)
        case HTTPException():
            return _http(error)
    return Problem("internal", "the request failed; see the service's log")


def refused(error: Exception, metrics: Metrics) -> Problem:
    """The problem for `error`. Counts rejections in `metrics`."""
    problem = problem_of(error)
    if reason := error.reason if isinstance(error, QueueFullError) else _REJECTIONS.get(problem.kind):
        metrics.rejected.labels(reason).inc()
    return problem


def install(app: FastAPI, metrics: Metrics) -> None:
    """Handle the expected exceptions of routes."""

    async def answer(request: Request, error: Exception) -> Response:
        return refused(error, metrics).response(request.scope)

    for kind in (
        Problem,
        UnsupportedFormatError,
        ImageTooLargeError,
        UndecodableImageError,
        QueueFullError,
        RateLimitError,
        DeadlineError,
        ClosedError,
        DecoderError,
        InferenceError,
        MemoryError,
        RequestValidationError,
        HTTPException,
    ):
        app.add_exception_handler(kind, answer)


def _invalid(error: RequestValidationError) -> Problem:
    errors, all_found = [], error.errors()
    for found in all_found[:SHOWN]:
        where, *path = (str(part) for part in found["loc"])
        name = ".".join(path)
        if found["type"] == "extra_forbidden":
            name = name[:100]
            message = f"{name!r} is not a parameter of this route; see GET /openapi.json"
        else:
            message = f"{name} is {str(found['input'])[:100]!r}: {sentence(found['msg'])}"
        errors.append({"in": where, "field": name, "message": message})
    messages = [e["message"] for e in errors]
    if len(all_found) > SHOWN:
        messages.append(f"and {len(all_found) - SHOWN} more")
    return Problem("invalid-parameter", "; ".join(messages), errors=errors)


def _http(error: HTTPException) -> Problem:
    headers = dict(error.headers or {})
    match error.status_code:
        case 404:
            return Problem("not-found", "no route has this path; see GET /openapi.json", headers)
        case 405:
            allowed = set(headers.get("Allow", "").split(", "))
            headers["Allow"] = ", ".join(sorted(allowed | {"HEAD"} if "GET" in allowed else allowed))
            return Problem("method-not-allowed", f"this path accepts {headers['Allow']}", headers)
    return Problem("malformed-request" if error.status_code < 500 else "internal", str(error.detail), headers)
