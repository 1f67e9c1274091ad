"""`GET /metrics`, for Prometheus."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from service.metrics import Metrics, joined
from service.siblings import Siblings

router = APIRouter()


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    summary="Metrics of Prometheus",
)
async def metrics(request: Request) -> Response:
    """Counters, gauges and histograms in Prometheus's text format; of every worker, where there are several."""
    own: Metrics = request.app.state.metrics
    siblings: Siblings | None = request.app.state.siblings
    text = await asyncio.to_thread(own.render)
    if siblings:
        texts = {siblings.index: text} | await siblings.ask_others("metrics")
        text = await asyncio.to_thread(joined, dict(sorted(texts.items())))
    return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})
