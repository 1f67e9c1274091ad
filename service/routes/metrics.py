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
    state = request.app.state
    if state.scrape is None:  # those who ask meanwhile share the answer: nobody may keep the service busy with this
        state.scrape = asyncio.ensure_future(_render(state.metrics, state.siblings))
        state.scrape.add_done_callback(lambda _: setattr(state, "scrape", None))
    text = await asyncio.shield(state.scrape)
    return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _render(own: Metrics, siblings: Siblings | None) -> bytes:
    text = await asyncio.to_thread(own.render)
    if siblings is None:
        return text
    texts = {siblings.index: text} | await siblings.ask_others("metrics")
    return await asyncio.to_thread(joined, dict(sorted(texts.items())))
