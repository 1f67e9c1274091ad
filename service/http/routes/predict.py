"""`POST /predict`: classify one image, and link to its heatmaps."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from camcal.service.address import client_address
from camcal.service.http.access import needs
from camcal.service.http.body import FORM, read_upload
from camcal.service.http.dependencies import Running, TimeoutMs, deadline_of, while_connected
from camcal.service.http.documented import binary, header, problems
from camcal.service.http.fields import form_schema
from camcal.service.http.prediction import PredictOptions, read_options, to_json
from camcal.service.http.schemas import Prediction
from camcal.service.metrics import server_timing

router = APIRouter(tags=["predict"])

_FORM = form_schema({"type": "string", "format": "binary", "description": "JPEG, PNG, WebP, GIF or BMP image."})
_BODY = {"required": True, "content": {FORM: {"schema": _FORM}, **binary("image/*")}}
_HEADERS = {"Server-Timing": header("Durations of decode, queue, inference and post in milliseconds.")}


@router.post(
    "/predict",
    dependencies=[needs("predict")],
    response_model=Prediction,
    response_description="The prediction.",
    responses={200: {"headers": _HEADERS}, **problems(400, 401, 403, 408, 413, 415, 422, 429, 500, 503, 504)},
    openapi_extra={"requestBody": _BODY},
    summary="Classify one image",
)
async def predict(
    request: Request,
    runtime: Running,
    queried: Annotated[PredictOptions, Query()],
    timeout_ms: TimeoutMs = None,
) -> Response:
    """Send the image as the file field `image` of a form, or as a raw body with the content type `image/*`.

    The query parameters may be fields of the form instead.
    """
    client_deadline = deadline_of(timeout_ms)
    model, settings, predictor = runtime.model, runtime.settings, runtime.predictor
    options, wanted = read_options(request, model, queried)
    with runtime.admission.ticket(client_address(request.scope)) as ticket:
        upload = await read_upload(request, settings, ticket)
        ticket.join()
        deadline = min(client_deadline, time.monotonic() + settings.timeout_s)
        if upload.takes_long:
            image, fields = await predictor.in_thread(upload.read, deadline=deadline, after=ticket.keep())
        else:
            image, fields = upload.read()
        if fields:
            options, wanted = read_options(request, model, queried, fields)
        work = predictor.predict(model, lambda: image, wanted, deadline=deadline, place=ticket, body=ticket)
        prediction = await while_connected(request, work)
    body = to_json(prediction, options, request.scope.get("root_path", ""))
    return Response(body, headers={"Server-Timing": server_timing(prediction.stages)}, media_type="application/json")
