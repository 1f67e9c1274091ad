"""`GET /metrics`, for Prometheus."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from service.metrics import Metrics

router = APIRouter()


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    summary="Metrics of Prometheus",
)
async def metrics(request: Request) -> Response:
    """Counters, gauges and histograms in Prometheus's text format."""
    found: Metrics = request.app.state.metrics
    return Response(await asyncio.to_thread(found.render), headers={"Content-Type": CONTENT_TYPE_LATEST})
