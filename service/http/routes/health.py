"""`GET /health/live` and `/health/ready`, for orchestrators and load balancers."""

from __future__ import annotations

from fastapi import APIRouter, Request

from camcal.service.http.dependencies import Running, require_alive, require_ready
from camcal.service.http.documented import problems
from camcal.service.http.schemas import Alive, ModelName, Ready

router = APIRouter(prefix="/health", tags=["operations"])


@router.get("/live", response_description="Alive.", responses=problems(503), summary="Check that the process is alive")
async def live(request: Request) -> Alive:
    """503 if the model fails on every batch, which a restart may fix."""
    require_alive(request.app)
    return Alive()


@router.get("/ready", response_description="Ready.", responses=problems(503), summary="Check that the service is ready")
async def ready(runtime: Running) -> Ready:
    """503 before warm-up is complete, while the service drains, and if the model fails on every batch."""
    require_ready(runtime)
    model = runtime.model
    name = ModelName(name=model.manifest.name, version=model.manifest.version)
    return Ready(model=name, provider=model.sessions[0].provider, device_fallback=model.sessions[0].fallback)
