"""The response to Prometheus: the metrics of all workers."""

from __future__ import annotations

import asyncio

from fastapi import Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import State

from camcal.service.http.siblings import Siblings
from camcal.service.metrics import Metrics, joined


async def scrape(state: State) -> Response:
    """The response to Prometheus, for the app with this `state`."""
    if state.scrape is None:  # concurrent scrapes share one response, so that scraping cannot overload the service
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
