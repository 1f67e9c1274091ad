"""The JSON that the service answers, for the OpenAPI document. Routes write it with orjson, for speed."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field

from camcal.models.bundle import Group, Prior
from camcal.models.preprocessing import Preprocessing
from camcal.models.report import GroupCalibration, ReliabilityBin


class ModelName(BaseModel):
    name: str
    version: str


class ClassPrediction(BaseModel):
    """One class's answer."""

    class_id: int
    label: str
    group: Group = Field(description="By training images: many above 100, few below 20, medium between.")
    train_count: int = Field(description="Training images of the class.")
    logit: float = Field(description="The plain score z; the plain heatmap sums to it.")
    probability: float = Field(description="softmax(z).")
    calibrated_logit: float = Field(description="The calibrated score z'; the calibrated heatmap sums to it.")
    calibrated_probability: float = Field(description="softmax(z'/T) under the class prior asked for.")


class CamLink(BaseModel):
    """Where the heatmaps of a prediction are."""

    url: str
    classes: list[int] = Field(
        description="Classes with a heatmap: those of `predictions` in the same order, then those of `cam_classes`."
    )
    grid: tuple[int, int] = Field(description="Rows and columns of a heatmap.")
    expires_at: datetime


class ImageSize(BaseModel):
    """The picture as decoded, upright."""

    width: int
    height: int


class Prediction(BaseModel):
    """The answer to one image. The four arrays are there with `logits=all`: one value a class."""

    id: str
    model: ModelName
    prior: Prior
    predictions: list[ClassPrediction] = Field(description="Best first, by calibrated probability.")
    cam: CamLink | None
    image: ImageSize
    logits: list[float] | None = None
    calibrated_logits: list[float] | None = None
    probabilities: list[float] | None = None
    calibrated_probabilities: list[float] | None = None


class ClassName(BaseModel):
    class_id: int
    label: str


class Contributions(BaseModel):
    """One heatmap in numbers."""

    class_id: int
    label: str
    calibrated: bool
    versus: ClassName | None = Field(description="The class that was subtracted, of map and score.")
    contributions: list[list[float]] = Field(description="h rows of w values; each position's part of the score.")
    sum: float = Field(description="Of all contributions.")
    score: float = Field(description="The logit that they explain, or the difference of two.")
    shift: float = Field(description="By how many positions the grid lies right of and below what it shows.")


class ClassDescription(BaseModel):
    class_id: int
    label: str
    group: Group
    train_count: int


class CalibrationDescription(BaseModel):
    """z' = omega·z + beta·weight_norm for each class; probabilities are softmax(z'/temperature).

    For another prior π they are softmax(z'/T + log π) with T from `prior_temperatures`, or `temperature` if not there.
    """

    scalar: float
    temperature: float
    prior_temperatures: dict[str, float]
    omega: list[float]
    beta: list[float]
    weight_norms: list[float]
    priors: list[Prior]


class ModelDescription(BaseModel):
    name: str
    version: str
    created: str
    classes: list[ClassDescription]
    groups: dict[Group, int] = Field(description="Classes in each group.")
    calibration: CalibrationDescription
    preprocessing: Preprocessing
    grid: tuple[int, int]
    figures: dict[str, Any] = Field(description="What was measured on the test set.")
    reliability: dict[str, list[ReliabilityBin]] | None = Field(
        description="Reliability diagrams on the test set, `trained` and `calibrated`, if the bundle's report has them."
    )
    by_predicted_group: dict[str, dict[str, GroupCalibration | None]] | None = Field(
        description="`trained` and `calibrated`, how far answers that name a many-, medium- or few-shot class can be "
        "believed, and likewise by rank: head, middle, tail. Null for a group that no answer named, or if the bundle's "
        "report does not have it."
    )


class Alive(BaseModel):
    status: str = "alive"


class Ready(BaseModel):
    status: str = "ready"
    model: ModelName
    provider: str = Field(description="ONNX Runtime's execution provider.")
    device_fallback: str | None = Field(description="Why the CPU stands in for a GPU, if it does.")


class FieldProblem(BaseModel):
    """One field at fault."""

    in_: str = Field(alias="in", description="query, path, header or body")
    field: str
    message: str


class ProblemDetails(BaseModel):
    """RFC 9457."""

    type: str = Field(description="Stable, for programs.", examples=["urn:camcal:error:undecodable-image"])
    title: str
    status: int
    detail: str = Field(description="A sentence: what was found, what was expected.")
    errors: list[FieldProblem] | None = None


class PredictionBatch(BaseModel):
    """One result an image, in the order of the request."""

    results: list[Prediction | ProblemDetails] = Field(description="A prediction, or the problem of a bad image.")
