"""`POST /predict/batch`: classify several images of one form, each as `/predict` would."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import ExitStack
from typing import Annotated

import orjson
from fastapi import APIRouter, Query, Request, Response

from camcal.service.address import client_address
from camcal.service.engine.admission import Ticket
from camcal.service.engine.decoding import Data
from camcal.service.http.access import needs
from camcal.service.http.body import FORM, check_size, images_of_form, read_large_body, require_form
from camcal.service.http.dependencies import Running, TimeoutMs, deadline_of, while_connected
from camcal.service.http.documented import problems
from camcal.service.http.errors import Problem, refused
from camcal.service.http.fields import form_schema
from camcal.service.http.prediction import PredictOptions, read_options, to_json
from camcal.service.http.rates import charge_images
from camcal.service.http.schemas import PredictionBatch

log = logging.getLogger("camcal")

router = APIRouter(tags=["predict"])

MAX_CLASSES = 2**16  # in all predictions of one response, which is built in the event loop

_FORM = form_schema(
    {
        "type": "array",
        "items": {"type": "string", "format": "binary"},
        "description": "JPEG, PNG, WebP, GIF or BMP images.",
    }
)
_BODY = {"required": True, "content": {FORM: {"schema": _FORM}}}


@router.post(
    "/predict/batch",
    dependencies=[needs("predict")],
    response_model=PredictionBatch,
    response_description="The results.",
    responses=problems(400, 401, 403, 408, 413, 415, 422, 429, 500, 503, 504),
    openapi_extra={"requestBody": _BODY},
    summary="Classify several images",
)
async def predict_batch(
    request: Request,
    runtime: Running,
    queried: Annotated[PredictOptions, Query()],
    timeout_ms: TimeoutMs = None,
) -> Response:
    """Send the images as files in the field `image` of a form. An invalid image does not affect the others.

    The query parameters may be fields of the form instead.
    """
    client_deadline = deadline_of(timeout_ms)
    model, settings, predictor = runtime.model, runtime.settings, runtime.predictor
    options, wanted = read_options(request, model, queried)
    content_type = request.headers.get("content-type", "")
    require_form(content_type)
    client, root_path = client_address(request.scope), request.scope.get("root_path", "")
    with runtime.admission.ticket(client) as body_ticket, ExitStack() as stack:
        body = await read_large_body(request, settings, body_ticket, "form")
        deadline = min(client_deadline, time.monotonic() + settings.timeout_s)
        images, fields = await predictor.in_thread(
            lambda: images_of_form(content_type, body, settings.images_limit),
            deadline=deadline,
            after=body_ticket.keep(),
        )
        if fields:
            options, wanted = read_options(request, model, queried, fields)
        if (classes := len(images) * wanted.top_k) > MAX_CLASSES:
            raise Problem(
                "invalid-parameter",
                f"{wanted.top_k} classes of {len(images)} images are {classes} predictions; the limit per response is "
                f"{MAX_CLASSES}: reduce top_k, or send fewer images",
            )
        charge_images(request.scope, len(images))
        tickets = stack.enter_context(runtime.admission.places(client, len(images)))

        async def result(image: Data, ticket: Ticket) -> orjson.Fragment:
            try:
                check_size(image, settings.max_bytes)
                prediction = await predictor.predict(
                    model, lambda: image, wanted, deadline=deadline, place=ticket, body=body_ticket
                )
                return orjson.Fragment(to_json(prediction, options, root_path))
            except Exception as error:  # one image fails, the others are not affected
                ticket.leave()
                problem = refused(error, runtime.metrics)
                if problem.kind == "internal":
                    log.error("an image of a batch failed", exc_info=error)
                return orjson.Fragment(orjson.dumps(problem.body()))

        results = await while_connected(request, asyncio.gather(*map(result, images, tickets)))
    return Response(orjson.dumps({"results": results}), media_type="application/json")
