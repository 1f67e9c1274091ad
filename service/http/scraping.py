"""The answer to Prometheus: the metrics of every worker."""

from __future__ import annotations

import asyncio

from fastapi import Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import State

from camcal.service.http.siblings import Siblings
from camcal.service.metrics import Metrics, joined


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
