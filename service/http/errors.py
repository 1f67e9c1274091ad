"""The one place where exceptions become `application/problem+json` (RFC 9457)."""

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
    "malformed-request": (400, "The request is malformed"),
    "unauthorized": (401, "The API key is missing or wrong"),
    "forbidden": (403, "Not allowed"),
    "not-found": (404, "There is nothing here"),
    "method-not-allowed": (405, "The method is not allowed"),
    "body-timeout": (408, "The request body came too slowly"),
    "too-large": (413, "The image is too large"),
    "unsupported-format": (415, "The format is not accepted"),
    "undecodable-image": (422, "The image cannot be decoded"),
    "invalid-parameter": (422, "A parameter is not valid"),
    "unknown-host": (421, "The host is unknown"),
    "queue-full": (429, "The queue is full"),
    "rate-limited": (429, "Too many requests"),
    "too-many-attempts": (429, "Too many wrong API keys"),
    "client-gone": (499, "The client has gone"),
    "internal": (500, "The service failed"),
    "not-ready": (503, "The service is not ready"),
    "out-of-memory": (503, "The service is out of memory"),
    "deadline-passed": (504, "The deadline has passed"),
}

SHOWN = 20  # faults of one request

_REJECTIONS = {
    "rate-limited": "rate_limited",
    "deadline-passed": "deadline",
    "not-ready": "not_ready",
    "out-of-memory": "memory",
}


@dataclass(eq=False)
class Problem(Exception):
    """An error for the client: `kind` is a key of KINDS, `detail` a sentence, `errors` the fields at fault."""

    kind: str
    detail: str
    headers: dict[str, str] = field(default_factory=dict)
    errors: list[dict[str, str]] = field(default_factory=list)

    @property
    def status(self) -> int:
        return KINDS[self.kind][0]

    def body(self) -> dict[str, Any]:
        """The members of RFC 9457, and `errors` where fields are at fault."""
        status, title = KINDS[self.kind]
        body = {"type": f"urn:camcal:error:{self.kind}", "title": title, "status": status, "detail": self.detail}
        return body | ({"errors": self.errors} if self.errors else {})

    def response(self, scope: Scope) -> Response:
        """The answer to the request of `scope`; under /v2 in the form of the Open Inference Protocol."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path == "/v2" or path.startswith("/v2/"):
            return Response(orjson.dumps({"error": self.detail}), self.status, self.headers, "application/json")
        return Response(orjson.dumps(self.body()), self.status, self.headers, PROBLEM_JSON)


def bad_parameter(name: str, message: str, where: str = "query") -> Problem:
    """A parameter whose value is not valid; `message` is a sentence that names it and what is accepted."""
    return Problem("invalid-parameter", message, errors=[{"in": where, "field": name, "message": message}])


def problem_of(error: Exception) -> Problem:
    """What a client is told of `error`. Anything unforeseen is `internal`, and says nothing of the inside."""
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
                headers["Connection"] = "close"  # the client is still sending
            return Problem("queue-full", str(error), headers)
        case RateLimitError():
            return Problem("rate-limited", str(error), {"Retry-After": str(error.retry_after_s)})
        case DeadlineError():
            return Problem("deadline-passed", "the model had no room for this request in time; try again later")
        case ClosedError():
            return Problem("not-ready", str(error))
        case MemoryError():
            message = "there was not enough memory for this request; try again later"
            return Problem("out-of-memory", message, {"Retry-After": "1"})
        case DecoderError():
            return Problem("not-ready", f"{error}; try again", {"Retry-After": "1"})
        case RequestValidationError():
            return _invalid(error)
        case HTTPException():
            return _http(error)
    return Problem("internal", "the service failed on this request; its log says why")


def refused(error: Exception, metrics: Metrics) -> Problem:
    """The problem of `error`, which is counted where it was for want of room or time."""
    problem = problem_of(error)
    if reason := error.reason if isinstance(error, QueueFullError) else _REJECTIONS.get(problem.kind):
        metrics.rejected.labels(reason).inc()
    return problem


def install(app: FastAPI, metrics: Metrics) -> None:
    """Let every foreseen exception of a route be answered by its problem, and count what was refused."""

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
            message = f"{name!r} is no parameter of this route; GET /openapi.json lists them"
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
            return Problem("not-found", "no route has this path; GET /openapi.json lists them all", headers)
        case 405:
            allowed = set(headers.get("Allow", "").split(", "))
            headers["Allow"] = ", ".join(sorted(allowed | {"HEAD"} if "GET" in allowed else allowed))
            return Problem("method-not-allowed", f"this path accepts {headers['Allow']}", headers)
    return Problem("malformed-request" if error.status_code < 500 else "internal", str(error.detail), headers)
