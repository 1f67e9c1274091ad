"""`GET /metrics`, for Prometheus."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import State

from camcal.service.access import for_metrics
from camcal.service.metrics import Metrics, joined
from camcal.service.routes.documented import problems
from camcal.service.siblings import Siblings

router = APIRouter()


@router.get(
    "/metrics",
    dependencies=[Depends(for_metrics)],
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **problems(401, 403, 429)},
    summary="Metrics of Prometheus",
)
async def metrics(request: Request) -> Response:
    """Counters, gauges and histograms in Prometheus's text format; of every worker, where there are several."""
    return await scrape(request.app.state)


async def scrape(state: State) -> Response:
    """The answer to Prometheus, of the app with this `state`."""
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
