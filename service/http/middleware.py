"""ASGI middleware: request ids, metrics, security headers, unexpected errors, and admission control."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from random import getrandbits

import orjson
from opentelemetry import trace
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from camcal.service.address import client_address, exact_address
from camcal.service.engine.admission import QueueFullError
from camcal.service.http.access import owner_of
from camcal.service.http.dependencies import running
from camcal.service.http.errors import Problem, problem_of, refused
from camcal.service.http.rates import RateLimitError, limit
from camcal.service.http.runtime import Runtime
from camcal.service.http.security import Hosts, SecurityHeaders
from camcal.service.logs import MODEL, request_id
from camcal.service.metrics import Metrics

log = logging.getLogger("camcal")
access = logging.getLogger("camcal.access")

_FREE = ("/health/", "/v2/health/", "/metrics")  # for probes and Prometheus, without a rate limit

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestMiddleware:
    """The outermost ASGI middleware: request ids, metrics, security headers and the access log.

    Args:
        app: the next ASGI app.
        metrics: the metrics to update.
        headers: added to every response.
        access_log: whether to log each request.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, headers: SecurityHeaders, access_log: bool = False):
        self.app = app
        self.metrics = metrics
        self.headers = headers
        self.access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method = scope["method"]
        if method == "HEAD":  # the response to GET; uvicorn leaves out the body
            scope = {**scope, "method": "GET"}
        exchange = _Exchange(scope, method, receive, send, self.headers)
        request_id.set(exchange.id)  # for the log; each request has its own context
        trace.get_current_span().set_attribute("camcal.request_id", exchange.id)
        try:
            with self.metrics.in_flight.track_inprogress():
                await self.app(scope, exchange.receive if self.access_log else receive, exchange.send)
        finally:
            self._record(exchange)

    def _record(self, exchange: _Exchange) -> None:
        seconds = time.perf_counter() - exchange.started
        code = str(exchange.code or 499)
        self.metrics.requests.labels(exchange.route, code).inc()
        self.metrics.request_seconds.labels(exchange.route).observe(seconds)
        if code == "499":
            self.metrics.cancelled.inc()
        if self.access_log:
            line = {
                "time": time.time(),
                "request_id": exchange.id,
                "method": exchange.method,
                "route": exchange.route,
                "code": int(code),
                "duration_s": round(seconds, 6),
                "key": owner_of(exchange.scope),
                "address": exact_address(exchange.scope),
                "bytes_in": exchange.bytes_in,
                "bytes_out": exchange.bytes_out,
                "model": exchange.scope.get(MODEL),
            }
            access.info(orjson.dumps(line).decode(), extra={"fields": line})


class _Exchange:
    """One request and its response."""

    def __init__(self, scope: Scope, method: str, receive: Receive, send: Send, headers: SecurityHeaders):
        self.scope = scope
        self.method = method
        self.started = time.perf_counter()
        self.code: int | None = None
        self.bytes_in = self.bytes_out = 0  # of the bodies
        self._receive = receive
        self._send = send
        self._headers = headers
        given = Headers(scope=scope).get("x-request-id", "")
        self.id = given if _REQUEST_ID.fullmatch(given) else f"{getrandbits(128):032x}"

    @property
    def route(self) -> str:
        """The template of the route. A label with the path would have unlimited values."""
        return getattr(self.scope.get("route"), "path", "unmatched")

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.code = message["status"]
            self._headers.add(message)
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self.id
            runtime = running(self.scope["app"]) if "app" in self.scope else None
            if runtime and runtime.draining:
                headers["Connection"] = "close"  # clients with keep-alive connections reconnect to another replica
        else:
            self.bytes_out += len(message.get("body", b""))
        await self._send(message)

    async def receive(self) -> Message:
        """Receive a message, and count its bytes."""
        message = await self._receive()
        self.bytes_in += len(message.get("body", b""))
        return message


class ErrorMiddleware:
    """ASGI middleware that checks the Host header and turns unexpected exceptions into 500 responses.

    It runs inside the CORS middleware: otherwise web pages of allowed origins could not read these responses.

    Args:
        app: the next ASGI app.
        hosts: the accepted Host headers.
    """

    def __init__(self, app: ASGIApp, *, hosts: Hosts):
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def send_response(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            self.hosts.check(scope)
            await self.app(scope, receive, send_response)
        except Exception as error:
            if not isinstance(error, Problem):
                log.exception("request %s failed", request_id.get())
            if not started:
                await problem_of(error).response(scope)(scope, receive, send)


class AdmissionMiddleware:
    """ASGI middleware that rejects requests if the queue is full or the address exceeds its rate limit.

    It runs before FastAPI handles the request, because rejections must be cheap under overload.

    Args:
        app: the next ASGI app.
        metrics: the metrics to update.
        routes: all routes, for the metrics.
        queued: the routes whose requests wait for the model. Their other checks, such as the API key, come later.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, routes: Sequence[BaseRoute], queued: Sequence[BaseRoute]):
        self.app = app
        self.metrics = metrics
        self.routes = routes
        self.queued = queued

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (runtime := running(scope["app"])):
            try:
                self._admit(scope, runtime)
            except (QueueFullError, RateLimitError) as error:
                await refused(error, self.metrics).response(scope)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _admit(self, scope: Scope, runtime: Runtime) -> None:
        rate = runtime.settings.address_rate
        if rate is not None and not scope["path"].removeprefix(scope.get("root_path", "")).startswith(_FREE):
            try:
                limit(scope, client_address(scope), rate, "CAMCAL_ADDRESS_RATE")
            except RateLimitError:
                _name_route(scope, self.routes)
                raise
        if scope["method"] == "POST":
            try:
                runtime.admission.check(client_address(scope))
            except QueueFullError:
                if _name_route(scope, self.queued):
                    raise


def _name_route(scope: Scope, routes: Sequence[BaseRoute]) -> bool:
    """Store the matching route in `scope` for the metrics; False if no route matches."""
    for route in routes:
        if route.matches(scope)[0] is Match.FULL:
            scope["route"] = route
            return True
    return False
