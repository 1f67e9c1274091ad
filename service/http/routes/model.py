"""`GET /model`: the served model, its calibration and its test results."""

from __future__ import annotations

import orjson
from fastapi import APIRouter, Response

from camcal.models.bundle import GROUPS, Bundle
from camcal.service.http.access import needs
from camcal.service.http.dependencies import Running
from camcal.service.http.documented import problems
from camcal.service.http.schemas import ModelDescription

router = APIRouter(tags=["model"])


@router.get(
    "/model",
    dependencies=[needs("model")],
    response_model=ModelDescription,
    response_description="The model.",
    responses=problems(401, 403, 429, 500, 503),
    summary="Describe the model",
)
async def get_model(runtime: Running) -> Response:
    """Classes, groups, calibration, preprocessing and test results."""
    return Response(orjson.dumps(describe(runtime.model.sessions[0].bundle)), media_type="application/json")


def describe(bundle: Bundle) -> dict[str, object]:
    """The body of `GET /model`."""
    manifest = bundle.manifest
    groups = [info.group for info in manifest.classes]
    return {
        "name": manifest.name,
        "version": manifest.version,
        "created": manifest.created,
        "classes": [
            {"class_id": k, "label": info.name, "group": info.group, "train_count": info.train_count}
            for k, info in enumerate(manifest.classes)
        ],
        "groups": {group: groups.count(group) for group in GROUPS},
        "calibration": {**manifest.calibration.model_dump(), "priors": manifest.priors},
        "preprocessing": manifest.preprocessing.model_dump(),
        "grid": manifest.grid,
        "figures": manifest.figures,
        **bundle.report.model_dump(),
    }
