"""Shared by `/predict` and `/predict/batch`: their parameters, and the JSON of one prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

import numpy as np
import orjson
from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field

from camcal.models.bundle import Prior
from camcal.service.engine.model import Model
from camcal.service.engine.predictor import Prediction, PredictionRequest
from camcal.service.engine.ranking import DEFAULT_TOP_K
from camcal.service.http.access import owner_of
from camcal.service.http.errors import bad_parameter
from camcal.service.http.fields import with_fields
from camcal.service.http.multipart import Part
from camcal.service.logs import MODEL

S = TypeVar("S")
T = TypeVar("T")


class PredictOptions(BaseModel):
    """Query parameters of `POST /predict` and `POST /predict/batch`, which may also be fields of the form."""

    model_config = ConfigDict(extra="forbid")

    top_k: int | None = Field(
        None, ge=1, description=f"Number of classes to return; {DEFAULT_TOP_K} by default, at most all."
    )
    cam: bool = Field(True, description="Keep heatmaps of these classes.")
    cam_classes: list[str] = Field(
        [], description="Index or label of another class to keep a heatmap of. May be repeated."
    )
    logits: Literal["none", "all"] = Field("none", description="`all`: also return the scores of all classes.")
    prior: Prior = Field(
        "balanced",
        description="Class prior of the calibrated probabilities: `balanced` (uniform), `train` (training-set "
        "frequencies) or `given` (set in the bundle).",
    )


def read_options(
    request: Request, model: Model, queried: PredictOptions, fields: Sequence[Part] = ()
) -> tuple[PredictOptions, PredictionRequest]:
    """The options of `request`, from its query and from the `fields` of its form, checked against `model`.

    Raises:
        Problem: 422 if they contradict each other or do not fit the model.
        RequestValidationError: for an invalid field.
    """
    options = with_fields(queried, request.query_params, fields) if fields else queried
    formed = {field.name for field in fields}

    def valid(name: str, check: Callable[[S], T], given: S) -> T:
        try:
            return check(given)
        except ValueError as error:
            message = str(error) if str(error).startswith(name) else f"{name}: {error}"
            raise bad_parameter(name, message, "body" if name in formed else "query") from None

    if options.cam_classes and not options.cam:
        message = "cam_classes needs heatmaps, but cam is false; omit one of them"
        raise bad_parameter("cam_classes", message, "body" if "cam_classes" in formed else "query")
    ranker = model.ranker
    request.scope[MODEL] = model.manifest.version
    return options, PredictionRequest(
        top_k=valid("top_k", ranker.check_top_k, options.top_k),
        cam=options.cam,
        cam_classes=[valid("cam_classes", ranker.class_id, name) for name in options.cam_classes],
        prior=valid("prior", ranker.check_prior, options.prior),
        owner=owner_of(request.scope),
    )


def to_json(prediction: Prediction, options: PredictOptions, root_path: str) -> bytes:
    """The JSON of `schemas.Prediction` for one image. `root_path` is the URL prefix of the app."""
    manifest, ranking, stored = prediction.model.manifest, prediction.ranking, prediction.stored
    body: dict[str, Any] = {
        "id": prediction.id,
        "model": {"name": manifest.name, "version": manifest.version},
        "prior": options.prior,
        "probability_prior": manifest.calibration.probability_prior,
        "predictions": prediction.model.ranker.rows(ranking),
        "cam": None
        if stored is None
        else {
            "url": f"{root_path}/cam/{prediction.id}",
            "classes": stored.classes,
            "grid": manifest.grid,
            "expires_at": datetime.fromtimestamp(stored.expires_at, UTC).isoformat(timespec="seconds"),
        },
        "image": {"width": prediction.width, "height": prediction.height},
    }
    if options.logits == "all":
        for name in ("logits", "calibrated_logits", "probabilities", "calibrated_probabilities"):
            body[name] = np.ascontiguousarray(getattr(ranking, name))
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
