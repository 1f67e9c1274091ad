"""Security headers for browsers, allowed hosts, and cross-origin requests."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Scope

from camcal.service.http.errors import Problem

_METHODS = ("GET", "HEAD", "POST", "DELETE")
_ASKED = (
    "Authorization",
    "If-None-Match",
    "Inference-Header-Content-Length",
    "Traceparent",
    "X-API-Key",
    "X-Request-Id",
    "X-Request-Timeout-Ms",
)
_OF_BODY = ("content-length", "content-type")
_EXPOSED = ("ETag", "Inference-Header-Content-Length", "Retry-After", "Server-Timing", "X-Request-Id")


class SecurityHeaders:
    """Security headers for responses that do not set them. The web page has its own Content-Security-Policy.

    Args:
        public: whether pages of any origin may use the API. They may then also embed its images.
    """

    def __init__(self, *, public: bool = False):
        headers = {
            "x-content-type-options": "nosniff",
            "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
            "x-frame-options": "DENY",
            "referrer-policy": "no-referrer",
            "cross-origin-resource-policy": "cross-origin" if public else "same-origin",
            "cache-control": "no-store",
        }
        self._headers = [(name.encode(), value.encode()) for name, value in headers.items()]

    def add(self, message: Message) -> None:
        """Add them to the message that starts a response."""
        there = {name for name, _ in message["headers"]}  # in lower case, as ASGI requires
        message["headers"] = [*message["headers"], *(pair for pair in self._headers if pair[0] not in there)]


class Hosts:
    """The accepted Host headers, against DNS rebinding.

    Args:
        allowed: names in lower case; `*.example.org` matches all subdomains. An empty list accepts any host.
    """

    def __init__(self, allowed: Sequence[str]):
        self._exact = frozenset(host for host in allowed if not host.startswith("*"))
        self._suffixes = tuple(host[1:] for host in allowed if host.startswith("*"))

    def check(self, scope: Scope) -> None:
        """Raises Problem 421 for another host, except on the health routes, which probes call by address."""
        if not self._exact and not self._suffixes:
            return
        host = _without_port(Headers(scope=scope).get("host", "")).lower().rstrip(".")
        if host in self._exact or (self._suffixes and host.endswith(self._suffixes)):
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not path.startswith(("/health/", "/v2/health/")):
            message = f"the Host header is {host[:100]!r}, which is not in CAMCAL_ALLOWED_HOSTS"
            raise Problem("unknown-host", message, {"Connection": "close"})


class Cors(CORSMiddleware):
    """Starlette's CORS middleware with our methods, headers and error format, and without credentials."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]):
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=_METHODS,
            allow_headers=_ASKED,
            expose_headers=_EXPOSED,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        headers = {name: value for name, value in response.headers.items() if name not in _OF_BODY}
        if response.status_code == 200:
            return Response(status_code=204, headers=headers)
        found = bytes(response.body).decode().removeprefix("Disallowed CORS ")
        problem = Problem("forbidden", f"{found} not allowed for cross-origin requests (CAMCAL_CORS_ORIGINS)", headers)
        return problem.response({"path": "/"})


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host
