"""`/v2`: the Open Inference Protocol, for clients of Triton and KServe. It takes pixels and returns raw outputs."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import ExitStack
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Header, Request, Response
from numpy.typing import NDArray
from pydantic import BaseModel

from camcal.service.address import client_address
from camcal.service.engine.batching import InferenceResult
from camcal.service.engine.model import Model
from camcal.service.http.access import needs
from camcal.service.http.body import read_large_body
from camcal.service.http.dependencies import (
    Running,
    TimeoutMs,
    deadline_of,
    require_alive,
    require_ready,
    while_connected,
)
from camcal.service.http.documented import binary, protocol_errors
from camcal.service.http.errors import Problem
from camcal.service.http.inference_protocol import (
    HEADER_LENGTH,
    Inference,
    ProtocolError,
    TensorMetadata,
    TooLongError,
    compose,
    input_metadata,
    output_metadata,
    parse,
)
from camcal.service.http.rates import charge_images
from camcal.service.http.runtime import Runtime
from camcal.service.logs import MODEL
from camcal.service.metrics import server_timing

NAME = "camcal"
EXTENSIONS = ["binary_tensor_data"]
MAX_MAP_VALUES = 2**22  # in one response

router = APIRouter(prefix="/v2", tags=["v2"])

HeaderLength = Annotated[
    str | None,
    Header(alias=HEADER_LENGTH, description="Length of the JSON in bytes, if binary tensors follow it."),
]


class Live(BaseModel):
    """The server is alive."""

    live: bool = True


class ServerReady(BaseModel):
    """The server is ready for requests."""

    ready: bool = True


class ModelReady(BaseModel):
    """The model is ready for requests."""

    name: str
    ready: bool = True


class ServerMetadata(BaseModel):
    """The server and its extensions of the protocol."""

    name: str
    version: str
    extensions: list[str]


class ModelMetadata(BaseModel):
    """The model, its inputs and its outputs."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class OutputTensor(BaseModel):
    """An output. Without `data`, its values are in `parameters.binary_data_size` bytes after the JSON."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] | None = None
    data: list[float] | None = None


class InferenceResponse(BaseModel):
    """The requested outputs."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


@router.get("/health/live", responses=protocol_errors(503), summary="Check that the server is alive")
async def v2_live(request: Request) -> Live:
    """Like `/health/live`."""
    require_alive(request.app)
    return Live()


@router.get("/health/ready", responses=protocol_errors(503), summary="Check that the server is ready")
async def v2_ready(runtime: Running) -> ServerReady:
    """Like `/health/ready`."""
    require_ready(runtime)
    return ServerReady()


@router.get("", summary="Get the server's metadata")
async def v2_server(request: Request) -> ServerMetadata:
    """Name, version and supported extensions."""
    return ServerMetadata(name=NAME, version=request.app.version, extensions=EXTENSIONS)


_OF_MODEL: dict[str, Any] = {"dependencies": [needs("v2")], "responses": protocol_errors(401, 403, 404, 422, 429, 503)}


@router.get("/models/{name}/ready", summary="Check that the model is ready", **_OF_MODEL)
async def v2_model_ready(runtime: Running, name: str) -> ModelReady:
    """The model is ready when the server is."""
    return _ready(runtime, _model(runtime, name))


@router.get("/models/{name}/versions/{version}/ready", summary="Check that this version is ready", **_OF_MODEL)
async def v2_version_ready(runtime: Running, name: str, version: str) -> ModelReady:
    """The version is ready when the server is."""
    return _ready(runtime, _model(runtime, name, version))


def _ready(runtime: Runtime, model: Model) -> ModelReady:
    require_ready(runtime)
    return ModelReady(name=model.manifest.name)


@router.get("/models/{name}", summary="Get the model's metadata", **_OF_MODEL)
async def v2_model(runtime: Running, name: str) -> ModelMetadata:
    """Inputs and outputs. The input `top_k` is optional."""
    return _metadata(_model(runtime, name))


@router.get("/models/{name}/versions/{version}", summary="Get this version's metadata", **_OF_MODEL)
async def v2_version(runtime: Running, name: str, version: str) -> ModelMetadata:
    """Inputs and outputs. The input `top_k` is optional."""
    return _metadata(_model(runtime, name, version))


def _metadata(model: Model) -> ModelMetadata:
    manifest = model.manifest
    return ModelMetadata(
        name=manifest.name,
        versions=[manifest.version],
        platform="onnxruntime_onnx",
        inputs=input_metadata(manifest),
        outputs=output_metadata(manifest),
    )


_INFER: dict[str, Any] = {
    "dependencies": [needs("v2")],
    "response_model": InferenceResponse,
    "response_description": "The outputs.",
    "responses": {
        200: {"content": binary("application/octet-stream")},
        **protocol_errors(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503, 504),
    },
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/InferenceRequest"}},
                **binary("application/octet-stream"),
            },
        }
    },
}


@router.post("/models/{name}/infer", summary="Run the model", **_INFER)
async def v2_infer(
    request: Request, runtime: Running, name: str, header_length: HeaderLength = None, timeout_ms: TimeoutMs = None
) -> Response:
    """Takes preprocessed pixels and returns the outputs of the network. Tensors are JSON, or bytes after the JSON."""
    return await _infer(request, runtime, _model(runtime, name), header_length, deadline_of(timeout_ms))


@router.post("/models/{name}/versions/{version}/infer", summary="Run this version", **_INFER)
async def v2_infer_version(
    request: Request,
    runtime: Running,
    name: str,
    version: str,
    header_length: HeaderLength = None,
    timeout_ms: TimeoutMs = None,
) -> Response:
    """Takes preprocessed pixels and returns the outputs of the network. Tensors are JSON, or bytes after the JSON."""
    return await _infer(request, runtime, _model(runtime, name, version), header_length, deadline_of(timeout_ms))


async def _infer(
    request: Request, runtime: Runtime, model: Model, header_length: str | None, client_deadline: float
) -> Response:
    settings = runtime.settings
    in_thread = runtime.predictor.in_thread
    request.scope[MODEL] = model.manifest.version
    if (coding := request.headers.get("content-encoding", "identity")) != "identity":
        raise Problem("unsupported-format", f"the body is compressed ({coding[:20]}); send it uncompressed")
    client = client_address(request.scope)
    with runtime.admission.ticket(client) as body_ticket, ExitStack() as stack:
        body = await read_large_body(request, settings, body_ticket, "body")
        deadline = min(client_deadline, time.monotonic() + settings.timeout_s)
        inference = await in_thread(
            lambda: _parse(runtime, model, body, header_length), deadline=deadline, after=body_ticket.keep()
        )
        charge_images(request.scope, len(inference.images))
        tickets = stack.enter_context(runtime.admission.places(client, len(inference.images)))
        top_k = _top_k(model, inference)
        tasks = [
            asyncio.ensure_future(
                runtime.served.batcher.submit(model.runs, image, top_k, deadline=deadline, on_dispatch=ticket.leave)
            )
            for image, ticket in zip(inference.images, tickets, strict=True)
        ]
        try:
            results = await while_connected(request, asyncio.gather(*tasks))
        finally:
            while tasks:  # if one fails, cancel the others
                tasks.pop().cancel()

    def finish() -> tuple[bytes, int | None]:
        for result in results:
            _observe(runtime, model, result)
        return compose(inference, model.manifest, _rows(results, top_k))

    with runtime.served.postprocessing():
        content, json_bytes = await in_thread(finish)
    slowest = max(results, key=lambda result: result.queue_s + result.inference_s)
    headers = {"Server-Timing": server_timing({"queue": slowest.queue_s, "inference": slowest.inference_s})}
    if json_bytes is None:
        return Response(content, headers=headers, media_type="application/json")
    headers[HEADER_LENGTH] = str(json_bytes)
    return Response(content, headers=headers, media_type="application/octet-stream")


def _model(runtime: Runtime, name: str, version: str | None = None) -> Model:
    model = runtime.model
    if name != model.manifest.name or version not in (None, model.manifest.version):
        wanted = name if version is None else f"{name} {version}"
        raise Problem("not-found", f"there is no model {wanted[:100]!r}; this server serves {model.label!r}")
    return model


def _parse(runtime: Runtime, model: Model, body: bytearray, header_length: str | None) -> Inference:
    size = model.manifest.preprocessing.input_size
    try:
        return parse(body, header_length, size, runtime.settings.images_limit)
    except TooLongError as error:
        raise Problem("too-large", str(error)) from None
    except ProtocolError as error:
        raise Problem("malformed-request", str(error)) from None


def _top_k(model: Model, inference: Inference) -> int:
    try:
        top_k = model.ranker.check_top_k(inference.top_k)
    except ValueError as error:
        raise Problem("malformed-request", str(error)) from None
    if (values := len(inference.images) * top_k * math.prod(model.manifest.grid)) > MAX_MAP_VALUES:
        raise Problem(
            "malformed-request",
            f"the maps of {top_k} classes of {len(inference.images)} images have {values} values; the limit per "
            f"response is {MAX_MAP_VALUES}: reduce top_k, or send fewer images",
        )
    return top_k


def _observe(runtime: Runtime, model: Model, result: InferenceResult) -> None:
    runtime.served.observe(model, model.ranker.rank(result.outputs, result.row, 1, "balanced"))
    for stage, seconds in (("queue", result.queue_s), ("inference", result.inference_s)):
        runtime.metrics.stage_seconds.labels(stage).observe(seconds)


def _rows(results: list[InferenceResult], top_k: int) -> dict[str, NDArray[Any]]:
    """The outputs of these images. Their batches may hold other images too, and more maps."""
    arrays = {
        name: np.stack([getattr(result.outputs, name)[result.row] for result in results])
        for name in ("logits", "calibrated_logits", "probabilities", "calibrated_probabilities")
    }
    for name in ("top_classes", "maps"):
        arrays[name] = np.stack([getattr(result.outputs, name)[result.row, :top_k] for result in results])
    return arrays
