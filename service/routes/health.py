"""`GET /health/live` and `/health/ready`, for orchestrators and balancers."""

from __future__ import annotations

from fastapi import APIRouter

from service.errors import Problem
from service.routes.documented import problems
from service.runtime import Running
from service.schemas import Alive, ModelName, Ready

router = APIRouter(prefix="/health")


@router.get("/live", summary="Is the process alive?")
async def live() -> Alive:
    """Answers whenever the event loop turns."""
    return Alive()


@router.get("/ready", responses=problems(503), summary="Should requests come here?")
async def ready(runtime: Running) -> Ready:
    """503 before the model is warm and while the service drains."""
    if not runtime.ready:
        raise Problem("not-ready", "the service is draining: it serves what still comes, and will stop")
    model = runtime.model
    name = ModelName(name=model.manifest.name, version=model.manifest.version)
    return Ready(model=name, provider=model.sessions[0].provider, device_fallback=model.sessions[0].fallback)
