"""`POST /predict`: one image in, ranked classes and a link to their heatmaps out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import orjson
from fastapi import APIRouter, Query, Request, Response
from opentelemetry import trace
from pydantic import BaseModel, ConfigDict, Field

from camcal.models.bundle import Prior
from camcal.service.access import needs, owner_of
from camcal.service.address import client_address
from camcal.service.admission import Ticket
from camcal.service.batching import Answer
from camcal.service.body import FIELD, read_upload
from camcal.service.deadline import TimeoutMs, latest
from camcal.service.decoding import Data, Decoded, LargeImageError, decode
from camcal.service.errors import bad_parameter
from camcal.service.explanation import explain
from camcal.service.logs import MODEL
from camcal.service.metrics import server_timing
from camcal.service.model import Model
from camcal.service.multipart import Part
from camcal.service.prediction import Ranking
from camcal.service.routes.documented import binary, header, problems
from camcal.service.routes.fields import form_schema, with_fields
from camcal.service.runtime import Running, Runtime, log, unless_gone
from camcal.service.schemas import Prediction
from camcal.service.stores import new_id

S = TypeVar("S")
T = TypeVar("T")

router = APIRouter()


class PredictOptions(BaseModel):
    """The query of `POST /predict` and `POST /predict/batch`; all of these may be fields of the form instead."""

    model_config = ConfigDict(extra="forbid")

    top_k: int | None = Field(None, ge=1, description="How many classes; 5 by default, at most all.")
    cam: bool = Field(True, description="Whether to keep heatmaps of these classes.")
    cam_classes: list[str] = Field(
        [], description="Index or label of a class to keep a heatmap of too; may be repeated."
    )
    logits: Literal["none", "all"] = Field("none", description="`all`: every class's scores too.")
    prior: Prior = Field(
        "balanced",
        description="Class prior of the calibrated probabilities: equal, as in training, or the bundle's own.",
    )


_FORM = {
    "type": "object",
    "required": [FIELD],
    "properties": {
        FIELD: {"type": "string", "format": "binary", "description": "JPEG, PNG, WebP, GIF or BMP"},
        **form_schema(PredictOptions),
    },
    "additionalProperties": False,
}
_BODY = {"required": True, "content": {"multipart/form-data": {"schema": _FORM}, **binary("image/*")}}
_HEADERS = {"Server-Timing": header("Milliseconds of decode, queue, inference and post.")}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the client asked for, of a model that has it."""

    top_k: int
    cam: bool
    cam_classes: list[int]  # with a heatmap beside the top k
    logits: Literal["none", "all"]
    prior: Prior
    path: str  # of the app, as the client sees it
    owner: str | None  # of the heatmaps


@router.post(
    "/predict",
    dependencies=[needs("predict")],
    response_model=Prediction,
    responses={200: {"headers": _HEADERS}, **problems(400, 401, 403, 408, 413, 415, 422, 429, 500, 503, 504)},
    openapi_extra={"requestBody": _BODY},
    summary="Classify one image",
)
async def predict(
    request: Request,
    runtime: Running,
    options: Annotated[PredictOptions, Query()],
    timeout_ms: TimeoutMs = None,
) -> Response:
    """The image is the file field `image` of a form, or the raw body with the content type `image/*`."""
    model, wish, settings = runtime.model, latest(timeout_ms), runtime.settings
    wanted = checked(request, model, options)
    with runtime.admission.ticket(client_address(request.scope)) as ticket:
        upload = await read_upload(request, settings, ticket)
        ticket.join()
        deadline = min(wish, time.monotonic() + settings.timeout_s)
        if upload.takes_long:
            image, fields = await runtime.in_thread(upload.read, deadline=deadline, after=ticket.keep())
        else:
            image, fields = upload.read()
        if fields:
            wanted = checked(request, model, options, fields)
        answered = answer_image(runtime, model, lambda: image, wanted, deadline, ticket, held=ticket)
        body, stages = await unless_gone(request, answered)
    return Response(body, headers={"Server-Timing": server_timing(stages)}, media_type="application/json")


def checked(request: Request, model: Model, options: PredictOptions, fields: Sequence[Part] = ()) -> Wanted:
    """What the options of `request`, in its query and in `fields` of its form, ask of `model`.

    Raises:
        Problem: 422 for what they cannot be, or the model does not have.
        RequestValidationError: for a field that is not valid.
    """
    if fields:
        options = with_fields(options, request.query_params, fields)
    formed = {field.name for field in fields}

    def valid(name: str, check: Callable[[S], T], given: S) -> T:
        try:
            return check(given)
        except ValueError as error:
            message = str(error) if str(error).startswith(name) else f"{name}: {error}"
            raise bad_parameter(name, message, "body" if name in formed else "query") from None

    if options.cam_classes and not options.cam:
        message = "cam_classes is given, but cam is false; leave out one of them"
        raise bad_parameter("cam_classes", message, "body" if "cam_classes" in formed else "query")
    ranker = model.ranker
    request.scope[MODEL] = model.manifest.version
    return Wanted(
        top_k=valid("top_k", ranker.check_top_k, options.top_k),
        cam=options.cam,
        cam_classes=[valid("cam_classes", ranker.class_id, name) for name in options.cam_classes],
        logits=options.logits,
        prior=valid("prior", ranker.check_prior, options.prior),
        path=request.scope.get("root_path", ""),
        owner=owner_of(request.scope),
    )


async def answer_image(
    runtime: Runtime,
    model: Model,
    read: Callable[[], Data],
    wanted: Wanted,
    deadline: float,
    ticket: Ticket,
    *,
    held: Ticket,
) -> tuple[bytes, dict[str, float]]:
    """The JSON of the prediction for the image that `read` gives, and the seconds that each stage of it took.

    `ticket` is in the queue until `deadline`, in the time of `time.monotonic`. `read` is called in a decode thread; it
    needs the bytes of `held`.
    """
    arrived = time.perf_counter()

    decoded, decode_started = await _decoded(runtime, model, read, wanted, deadline, held)
    decode_s = time.perf_counter() - decode_started
    top_k = model.ranker.maps_needed(wanted.top_k, wanted.prior, wanted.cam, bool(wanted.cam_classes))
    answer = await runtime.batcher.submit(
        model.runs, decoded.pixels, top_k, deadline=deadline, on_dispatch=ticket.leave
    )

    post_started = time.perf_counter()
    with runtime.soundness.concluding():
        body = await _compose(runtime, model, answer, decoded, wanted)
    stages = {
        "decode": decode_s,
        "queue": decode_started - arrived + answer.queue_s,
        "inference": answer.inference_s,
        "post": time.perf_counter() - post_started,
    }
    for stage, seconds in stages.items():
        runtime.metrics.stage_seconds.labels(stage).observe(seconds)
    span = trace.get_current_span()  # does nothing without CAMCAL_OTEL
    span.set_attributes({f"camcal.{stage}_ms": seconds * 1000 for stage, seconds in stages.items()})
    return body, stages


async def _decoded(
    runtime: Runtime, model: Model, read: Callable[[], Data], wanted: Wanted, deadline: float, held: Ticket
) -> tuple[Decoded, float]:
    """The image that `read` gives, and when its decoding began: in a thread, or if it is large in another process."""
    rule = model.manifest.preprocessing

    def decode_ordinary() -> tuple[Decoded, float]:
        started = time.perf_counter()
        ordinary = runtime.ordinary_bytes
        return decode(read(), rule, runtime.limits, picture=wanted.cam, ordinary_bytes=ordinary), started

    try:
        return await runtime.in_thread(decode_ordinary, deadline=deadline, after=held.keep())
    except LargeImageError as error:
        large, started = error.with_traceback(None), time.perf_counter()  # its traceback would hold this frame
    runtime.metrics.large_images.inc()
    return await runtime.large.decode(large, rule, picture=wanted.cam, deadline=deadline), started


async def _compose(runtime: Runtime, model: Model, answer: Answer, decoded: Decoded, wanted: Wanted) -> bytes:
    ranking = model.ranker.rank(answer.outputs, answer.row, wanted.top_k, wanted.prior)
    observe(runtime, model, ranking)
    key = new_id(runtime.worker)
    body: dict[str, Any] = {
        "id": key,
        "model": {"name": model.manifest.name, "version": model.manifest.version},
        "prior": wanted.prior,
        "predictions": model.ranker.rows(ranking),
        "cam": await _keep(runtime, model, key, answer, ranking, decoded, wanted) if wanted.cam else None,
        "image": {"width": decoded.width, "height": decoded.height},
    }
    if wanted.logits == "all":
        for name in ("logits", "calibrated_logits", "probabilities", "calibrated_probabilities"):
            body[name] = np.ascontiguousarray(getattr(ranking, name))
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


async def _keep(
    runtime: Runtime, model: Model, key: str, answer: Answer, ranking: Ranking, decoded: Decoded, wanted: Wanted
) -> dict[str, Any] | None:
    """Store the maps. A store that fails costs the prediction its `cam` and nothing else."""
    started = time.perf_counter()
    ttl_s = runtime.settings.cam_ttl_s
    classes = list(dict.fromkeys((*ranking.classes, *wanted.cam_classes)))
    expires_at = time.time() + ttl_s
    explanation = explain(model.ranker, answer.outputs, answer.row, ranking, classes, decoded, expires_at, wanted.owner)
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
        "grid": model.manifest.grid,
        "expires_at": datetime.fromtimestamp(explanation.expires_at, UTC).isoformat(timespec="seconds"),
    }


def observe(runtime: Runtime, model: Model, ranking: Ranking) -> None:
    """What only a calibrated service can tell of its traffic."""
    best = ranking.classes[0]
    group = model.manifest.classes[best].group
    calibrated = float(ranking.calibrated_probabilities[best])
    runtime.metrics.predictions.labels(group).inc()
    runtime.metrics.confidence.labels(group).observe(calibrated)
    runtime.metrics.shift.observe(calibrated - float(ranking.probabilities[best]))
