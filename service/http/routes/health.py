"""`GET /health/live` and `/health/ready`, for orchestrators and balancers."""

from __future__ import annotations

from fastapi import APIRouter, Request

from camcal.service.http.dependencies import Running, require_alive, require_ready
from camcal.service.http.documented import problems
from camcal.service.http.schemas import Alive, ModelName, Ready

router = APIRouter(prefix="/health")


@router.get("/live", responses=problems(503), summary="Is the process alive?")
async def live(request: Request) -> Alive:
    """Answers whenever the event loop turns; 503 when the model fails on every batch, which a restart may mend."""
    require_alive(request.app)
    return Alive()


@router.get("/ready", responses=problems(503), summary="Should requests come here?")
async def ready(runtime: Running) -> Ready:
    """503 before the model is warm, while the service drains, and when the model fails on every batch."""
    require_ready(runtime)
    model = runtime.model
    name = ModelName(name=model.manifest.name, version=model.manifest.version)
    return Ready(model=name, provider=model.sessions[0].provider, device_fallback=model.sessions[0].fallback)
