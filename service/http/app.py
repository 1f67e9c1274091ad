"""The ASGI app: routes, middleware and OpenAPI document."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from camcal.service.background import in_background
from camcal.service.engine.model import Model, load_proven
from camcal.service.engine.proofs import Proofs
from camcal.service.engine.session import Session
from camcal.service.http import errors
from camcal.service.http.access import Attempts
from camcal.service.http.documented import TAGS, without_null
from camcal.service.http.inference_protocol import InferenceError, InferenceRequest
from camcal.service.http.metrics_port import metrics_port
from camcal.service.http.middleware import AdmissionMiddleware, ErrorMiddleware, RequestMiddleware
from camcal.service.http.rates import RateLimits
from camcal.service.http.routes import batch, cam, health, model, page, predict, v2
from camcal.service.http.routes import metrics as metrics_route
from camcal.service.http.runtime import Runtime
from camcal.service.http.schemas import Contributions, ProblemDetails
from camcal.service.http.security import Cors, Hosts, SecurityHeaders
from camcal.service.http.siblings import Siblings
from camcal.service.keys import Keyring
from camcal.service.mailbox import Mailbox
from camcal.service.metrics import Metrics
from camcal.service.settings import Settings, SettingsError, load_settings

API_VERSION = "1.0.0"
_DESCRIPTION = (
    "Image classification with probabilities calibrated for long-tailed data, and heatmaps that sum to the score they "
    "explain. Errors are `application/problem+json` (RFC 9457) with a stable `type`."
)

# Bodies that no route declares by its types.
_UNDECLARED = (ProblemDetails, Contributions, InferenceRequest, InferenceError)


def create_app(
    settings: Settings | None = None,
    *sessions: Session,
    siblings: Siblings | None = None,
    decoder: Mailbox | None = None,
    metrics: Sequence[socket.socket] = (),
) -> FastAPI:
    """The service as an ASGI app.

    Args:
        settings: by default those of the environment.
        sessions: a loaded model, one session per device; by default the lifespan loads `settings.bundle`, which may
            raise BundleError or DeviceError.
        siblings: the other workers, if this process is one of several.
        decoder: the mailbox of the `DecoderProcess` that they share.
        metrics: bound sockets for /metrics, if CAMCAL_METRICS_PORT is set.
    """
    settings = settings or load_settings()
    app = FastAPI(
        title="camcal",
        version=API_VERSION,
        description=_DESCRIPTION,
        openapi_tags=TAGS,
        generate_unique_id_function=_operation_id,
        lifespan=_lifespan,
        docs_url=None,  # both pages load scripts from other hosts
        redoc_url=None,
        openapi_url=None,  # served below, as a route with a template like all others
        redirect_slashes=False,
        # Metrics go to Prometheus and logs to standard error; only traces use OpenTelemetry.
        telemetry={
            "tracing": settings.otel,
            "auto_configure": settings.otel,
            "operation_spans": False,
            "metrics": False,
            "logs": False,
        },
    )
    app.state.settings = settings
    app.state.sessions = sessions
    app.state.siblings = siblings
    app.state.decoder = decoder
    app.state.metrics_sockets = metrics
    app.state.metrics = Metrics()
    app.state.keys = keyring(settings)
    app.state.attempts = Attempts(settings.key_attempts)
    app.state.rates = RateLimits(settings.rate_burst_s, siblings.count if siblings else 1)
    app.state.openapi = None
    app.state.scrape = None
    modules = (predict, batch, v2, cam, model, health, page)
    routers = [module.router for module in modules]
    if settings.metrics_port is None:
        routers.append(metrics_route.router)
    routes = [route for router in routers for route in router.routes]
    queued = [route for router in routers[:3] for route in router.routes]
    app.add_middleware(AdmissionMiddleware, metrics=app.state.metrics, routes=routes, queued=queued)
    app.add_middleware(ErrorMiddleware, hosts=Hosts(settings.allowed_hosts))
    if settings.cors_origins:
        app.add_middleware(Cors, origins=settings.cors_origins)
    app.add_middleware(
        RequestMiddleware,
        metrics=app.state.metrics,
        headers=SecurityHeaders(public="*" in settings.cors_origins),
        access_log=settings.access_log,
    )
    errors.install(app, app.state.metrics)
    for router in routers:
        app.include_router(router)
    app.add_api_route("/openapi.json", _openapi_json, include_in_schema=False)
    return app


def keyring(settings: Settings) -> Keyring:
    """The API keys in `settings`. Raises SettingsError if the file is invalid."""
    main = settings.api_key
    try:
        return Keyring(None if main is None else main.get_secret_value(), settings.api_keys_file)
    except ValueError as error:
        raise SettingsError(f"CAMCAL_API_KEYS_FILE is {str(settings.api_keys_file)!r}: {error}") from None


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    siblings: Siblings | None = app.state.siblings
    proofs = siblings.proofs if siblings else Proofs()
    sessions = app.state.sessions or await in_background(lambda: load_proven(settings, proofs))
    app.state.sessions = ()  # only the runtime holds the model, so that a reload frees it
    app.state.runtime = runtime = Runtime(
        settings, Model(tuple(sessions)), app.state.metrics, siblings, app.state.decoder
    )
    del sessions
    hush = siblings.serve(runtime.answer) if siblings else None
    watches = [asyncio.create_task(app.state.keys.watch())]
    if settings.watch:
        watches.append(asyncio.create_task(runtime.served.watch()))
    try:
        async with metrics_port(app, app.state.metrics_sockets):
            yield
    finally:
        for watch in watches:
            watch.cancel()
        await runtime.close()
        if hush:
            hush()
        app.state.runtime = None


async def _openapi_json(request: Request) -> Response:
    state = request.app.state
    if state.openapi is None:  # takes 50 ms, once: concurrent requests share it
        state.openapi = asyncio.ensure_future(asyncio.to_thread(_openapi_bytes, request.app))
    return Response(await asyncio.shield(state.openapi), media_type="application/json")


def _openapi_bytes(app: FastAPI) -> bytes:
    document = openapi(app)
    if root_path := app.state.settings.root_path:  # or clients would call the proxy without the prefix
        document["servers"] = [{"url": root_path}]
    return orjson.dumps(document)


def _operation_id(route: APIRoute) -> str:
    """The name of a method in generated clients: the function that handles the route."""
    return route.name


def openapi(app: FastAPI) -> dict[str, object]:
    """The OpenAPI document; needs no bundle."""
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, tags=app.openapi_tags, routes=app.routes
    )
    schemas = document["components"]["schemas"]
    for body in _UNDECLARED:
        schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[body.__name__] = schema
    # FastAPI's own error body, which this service never sends.
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    about = "The service's API key, if it has one."
    document["components"]["securitySchemes"] = {
        "HTTPBearer": {"type": "http", "scheme": "bearer", "description": about},
        "APIKeyHeader": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": about},
    }
    for operations in document["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                parameter["schema"] = without_null(parameter["schema"])
            if "401" in operation["responses"]:  # a service without a key asks for none: {}
                operation["security"] = [{}, {"HTTPBearer": []}, {"APIKeyHeader": []}]
    return document
