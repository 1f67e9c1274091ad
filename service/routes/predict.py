"""`POST /predict`: one image in, ranked classes and a link to their heatmaps out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from fastapi import APIRouter, Query, Request, Response

from service.admission import Ticket
from service.batching import Answer, DeadlineError
from service.body import FIELD, read_image
from service.decoding import Decoded, decode
from service.errors import bad_parameter
from service.explanation import explain
from service.prediction import Prior, Ranking
from service.routes.documented import binary, header, problems
from service.runtime import Key, Running, Runtime, log, unless_gone
from service.schemas import Prediction
from service.stores import new_id

router = APIRouter()

_FORM = {
    "type": "object",
    "required": [FIELD],
    "properties": {FIELD: {"type": "string", "format": "binary", "description": "JPEG, PNG, WebP, GIF or BMP"}},
}
_BODY = {"required": True, "content": {"multipart/form-data": {"schema": _FORM}, **binary("image/*")}}
_HEADERS = {"Server-Timing": header("Milliseconds of decode, queue, inference and post.")}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the client asked for."""

    top_k: int
    cam: bool
    cam_classes: list[int]  # with a heatmap beside the top k
    logits: Literal["none", "all"]
    prior: Prior
    path: str  # of the app, as the client sees it


@router.post(
    "/predict",
    dependencies=[Key],
    response_model=Prediction,
    responses={200: {"headers": _HEADERS}, **problems(400, 401, 408, 413, 415, 422, 429, 500, 503, 504)},
    openapi_extra={"requestBody": _BODY},
    summary="Classify one image",
)
async def predict(
    request: Request,
    runtime: Running,
    top_k: Annotated[int | None, Query(ge=1, description="How many classes; 5 by default, at most all.")] = None,
    cam: Annotated[bool, Query(description="Whether to keep heatmaps of these classes.")] = True,
    cam_classes: Annotated[
        list[str] | None, Query(description="Index or label of a class to keep a heatmap of too; may be repeated.")
    ] = None,
    logits: Annotated[Literal["none", "all"], Query(description="`all`: every class's scores too.")] = "none",
    prior: Annotated[
        Prior, Query(description="Class prior of the calibrated probabilities: equal, or as in training.")
    ] = "balanced",
) -> Response:
    """The image is the file field `image` of a form, or the raw body with the content type `image/*`."""
    try:
        count = runtime.ranker.check_top_k(top_k)
    except ValueError as error:
        raise bad_parameter("top_k", str(error)) from None
    others = _cam_classes(runtime, cam_classes, cam)
    wanted = Wanted(
        top_k=count, cam=cam, cam_classes=others, logits=logits, prior=prior, path=request.scope.get("root_path", "")
    )
    settings = runtime.settings
    with runtime.admission.ticket() as ticket:
        data = await read_image(
            request, max_bytes=settings.max_bytes, timeout_s=settings.body_timeout_s, reserve=ticket.reserve
        )
        ticket.join()
        return await unless_gone(request, _answer(runtime, data, wanted, ticket))


def _cam_classes(runtime: Runtime, wanted: list[str] | None, cam: bool) -> list[int]:
    if wanted and not cam:
        raise bad_parameter("cam_classes", "cam_classes is given, but cam is false; leave out one of them")
    try:
        return [runtime.ranker.class_id(name) for name in wanted or ()]
    except ValueError as error:
        raise bad_parameter("cam_classes", f"cam_classes: {error}") from None


async def _answer(runtime: Runtime, data: bytes, wanted: Wanted, ticket: Ticket) -> Response:
    arrived = time.perf_counter()
    deadline = time.monotonic() + runtime.settings.timeout_s

    def decode_in_time() -> tuple[Decoded, float]:
        if time.monotonic() >= deadline:
            raise DeadlineError
        started = time.perf_counter()
        return decode(data, runtime.manifest.preprocessing, runtime.limits, picture=wanted.cam), started

    decoded, decode_started = await runtime.in_thread(decode_in_time)
    decode_s = time.perf_counter() - decode_started
    top_k = runtime.ranker.maps_needed(wanted.top_k, wanted.prior, wanted.cam, bool(wanted.cam_classes))
    answer = await runtime.batcher.submit(decoded.pixels, top_k, deadline=deadline, on_dispatch=ticket.leave)

    post_started = time.perf_counter()
    body = await _compose(runtime, answer, decoded, wanted)
    stages = {
        "decode": decode_s,
        "queue": decode_started - arrived + answer.queue_s,
        "inference": answer.inference_s,
        "post": time.perf_counter() - post_started,
    }
    for stage, seconds in stages.items():
        runtime.metrics.stage_seconds.labels(stage).observe(seconds)
    timing = ", ".join(f"{stage};dur={seconds * 1000:.3f}" for stage, seconds in stages.items())
    return Response(body, headers={"Server-Timing": timing}, media_type="application/json")


async def _compose(runtime: Runtime, answer: Answer, decoded: Decoded, wanted: Wanted) -> bytes:
    ranking = runtime.ranker.rank(answer.outputs, answer.row, wanted.top_k, wanted.prior)
    _observe(runtime, ranking)
    key = new_id()
    body: dict[str, Any] = {
        "id": key,
        "model": {"name": runtime.manifest.name, "version": runtime.manifest.version},
        "prior": wanted.prior,
        "predictions": runtime.ranker.rows(ranking),
        "cam": await _keep(runtime, key, answer, ranking, decoded, wanted) if wanted.cam else None,
        "image": {"width": decoded.width, "height": decoded.height},
    }
    if wanted.logits == "all":
        for name in ("logits", "calibrated_logits", "probabilities", "calibrated_probabilities"):
            body[name] = np.ascontiguousarray(getattr(ranking, name))
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


async def _keep(
    runtime: Runtime, key: str, answer: Answer, ranking: Ranking, decoded: Decoded, wanted: Wanted
) -> dict[str, Any] | None:
    """Store the maps. A store that fails costs the prediction its `cam` and nothing else."""
    started = time.perf_counter()
    ttl_s = runtime.settings.cam_ttl_s
    classes = list(dict.fromkeys((*ranking.classes, *wanted.cam_classes)))
    expires_at = time.time() + ttl_s
    explanation = explain(runtime.ranker, answer.outputs, answer.row, ranking, classes, decoded, expires_at)
    try:
        await runtime.store.put(key, explanation.pack(), ttl_s)
    except Exception as error:  # whatever a store can raise: the network, the disk, no room
        log.warning("a heatmap could not be kept: %s", error)
        runtime.metrics.store_failures.labels("put").inc()
        return None
    runtime.metrics.stage_seconds.labels("store").observe(time.perf_counter() - started)
    return {
        "url": f"{wanted.path}/cam/{key}",
        "classes": classes,
        "grid": runtime.manifest.grid,
        "expires_at": datetime.fromtimestamp(explanation.expires_at, UTC).isoformat(timespec="seconds"),
    }


def _observe(runtime: Runtime, ranking: Ranking) -> None:
    """What only a calibrated service can tell of its traffic."""
    best = ranking.classes[0]
    group = runtime.manifest.classes[best].group
    calibrated = float(ranking.calibrated_probabilities[best])
    runtime.metrics.predictions.labels(group).inc()
    runtime.metrics.confidence.labels(group).observe(calibrated)
    runtime.metrics.shift.observe(calibrated - float(ranking.probabilities[best]))
