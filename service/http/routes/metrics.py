"""`GET /metrics`, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request, Response

from camcal.service.http.access import for_metrics
from camcal.service.http.documented import problems
from camcal.service.http.scraping import scrape

router = APIRouter(tags=["operations"])


@router.get(
    "/metrics",
    dependencies=[Depends(for_metrics)],
    response_class=Response,
    response_description="The metrics.",
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **problems(401, 403, 429)},
    summary="Get metrics for Prometheus",
)
async def metrics(request: Request) -> Response:
    """Counters, gauges and histograms of all workers in Prometheus's text format."""
    return await scrape(request.app.state)
