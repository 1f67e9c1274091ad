"""The JSON bodies of responses, for the OpenAPI document. Routes write them with orjson, for speed."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from camcal.models.bundle import Group, PlainPrior, Prior
from camcal.models.preprocessing import Preprocessing
from camcal.models.report import GroupCalibration, ReliabilityBin


class ModelName(BaseModel):
    """The model and its version."""

    name: str
    version: str = Field(description="Changes with the content of the bundle.")


class ClassPrediction(BaseModel):
    """The scores of one class."""

    class_id: int
    label: str
    group: Group = Field(
        description="By number of training images: many (over 100), medium (20 to 100) or few (under 20)."
    )
    train_count: int = Field(description="Number of training images of the class.")
    logit: float = Field(description="Plain score z. The plain heatmap sums to it.")
    probability: float = Field(
        description="softmax(z), for the class prior named by `probability_prior`, which is that of the training."
    )
    calibrated_logit: float = Field(description="Calibrated score z'. The calibrated heatmap sums to it.")
    calibrated_probability: float = Field(description="softmax(z'/T), for the requested class prior.")


class CamLink(BaseModel):
    """Where to get the heatmaps of a prediction."""

    url: str = Field(description="Path of `GET /cam/{id}` on this server.")
    classes: list[int] = Field(
        description="Classes with a heatmap: those of `predictions` in the same order, then those of `cam_classes`."
    )
    grid: tuple[int, int] = Field(description="Rows and columns of a heatmap.")
    expires_at: datetime


class ImageSize(BaseModel):
    """Size of the decoded image in pixels, after applying its EXIF orientation."""

    width: int
    height: int


class Prediction(BaseModel):
    """The prediction for one image. The last four fields come with `logits=all` and have one value per class."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "Rz0w9XkVh1eGDqgLPbY0sA",
                    "model": {"name": "caltech100", "version": "8e36c413e4db"},
                    "prior": "balanced",
                    "probability_prior": "train",
                    "predictions": [
                        {
                            "class_id": 60,
                            "label": "metronome",
                            "group": "few",
                            "train_count": 17,
                            "logit": 6.52,
                            "probability": 0.146,
                            "calibrated_logit": 9.41,
                            "calibrated_probability": 0.575,
                        }
                    ],
                    "cam": {
                        "url": "/cam/Rz0w9XkVh1eGDqgLPbY0sA",
                        "classes": [60],
                        "grid": [7, 7],
                        "expires_at": "2026-01-31T12:00:00+00:00",
                    },
                    "image": {"width": 100, "height": 140},
                }
            ]
        }
    )

    id: str = Field(description="Names the prediction's heatmaps: `GET /cam/{id}`.")
    model: ModelName
    prior: Prior = Field(description="Class prior of the calibrated probabilities.")
    probability_prior: PlainPrior | None = Field(
        description="Class prior of the plain probabilities: `balanced` (uniform), `train` (training-set frequencies) "
        "or `other`, as loss and sampler of the training imply. Null if the bundle does not say. Where it differs from "
        "`prior`, a part of the move from `probability` to `calibrated_probability` is the change of the prior."
    )
    predictions: list[ClassPrediction] = Field(description="Best classes, by descending calibrated probability.")
    cam: CamLink | None = Field(description="Null if no heatmap was kept.")
    image: ImageSize
    logits: list[float] | None = None
    calibrated_logits: list[float] | None = None
    probabilities: list[float] | None = None
    calibrated_probabilities: list[float] | None = None


class ClassName(BaseModel):
    """A class."""

    class_id: int
    label: str


class Contributions(BaseModel):
    """The numbers of one heatmap: how much each position contributes to the score."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "class_id": 60,
                    "label": "metronome",
                    "calibrated": True,
                    "versus": None,
                    "contributions": [[0.5, 1.25], [-0.25, 2.0]],
                    "sum": 3.5,
                    "score": 3.5,
                    "window": [0.25, 0.25, 2.25, 2.25],
                }
            ]
        }
    )

    class_id: int
    label: str
    calibrated: bool = Field(description="Whether the calibrated or the plain score is explained.")
    versus: ClassName | None = Field(description="The class whose heatmap and score were subtracted.")
    contributions: list[list[float]] = Field(description="Rows of the grid from top to bottom.")
    sum: float = Field(description="Sum of all contributions.")
    score: float = Field(description="The explained score, or the difference of two; equal to `sum` up to rounding.")
    window: tuple[float, float, float, float] = Field(
        description="Where the seen part of the image lies in the grid: left, top, right and bottom, in positions from "
        "the grid's upper left corner. It may reach beyond the grid, and is smaller for a letterboxed image."
    )


class ClassDescription(BaseModel):
    """A class and its training set."""

    class_id: int
    label: str
    group: Group
    train_count: int


class CalibrationDescription(BaseModel):
    """z' = omega·z + beta·weight_norm for each class; probabilities are softmax(z'/temperature).

    For another class prior π they are softmax(z'/T + log π), where T is the prior's entry in `prior_temperatures`,
    or `temperature` if it has none.
    """

    scalar: float
    temperature: float
    probability_prior: PlainPrior | None = Field(description="Class prior of softmax(z); null if unknown.")
    prior_temperatures: dict[str, float]
    omega: list[float]
    beta: list[float]
    weight_norms: list[float]
    priors: list[Prior]


class ModelDescription(BaseModel):
    """The served model."""

    name: str
    version: str
    created: str
    classes: list[ClassDescription]
    groups: dict[Group, int] = Field(description="Number of classes in each group.")
    calibration: CalibrationDescription
    preprocessing: Preprocessing
    grid: tuple[int, int]
    figures: dict[str, Any] = Field(description="Results on the test set.")
    reliability: dict[str, list[ReliabilityBin]] | None = Field(
        description="Reliability diagrams on the test set, `trained` and `calibrated`. Null if the report has none."
    )
    by_predicted_group: dict[str, dict[str, GroupCalibration | None]] | None = Field(
        description="Confidence and accuracy by group of the predicted class, `trained` and `calibrated`: by training "
        "images (many, medium, few) and by rank (head, middle, tail). A group that was never predicted is null."
    )


class Alive(BaseModel):
    """The process is alive."""

    status: str = "alive"


class Ready(BaseModel):
    """The service is ready for requests."""

    status: str = "ready"
    model: ModelName
    provider: str = Field(description="ONNX Runtime's execution provider.")
    device_fallback: str | None = Field(description="Why the CPU is used instead of a GPU; null if it is not.")


class FieldProblem(BaseModel):
    """An invalid field of a request."""

    in_: str = Field(alias="in", description="query, path, header or body")
    field: str
    message: str


class ProblemDetails(BaseModel):
    """An error, as RFC 9457 defines it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:camcal:error:undecodable-image",
                    "title": "Image cannot be decoded",
                    "status": 422,
                    "detail": "the image is damaged or truncated",
                }
            ]
        }
    )

    type: str = Field(description="Stable identifier for programs.")
    title: str = Field(description="Short summary of the type.")
    status: int = Field(description="HTTP status code.")
    detail: str = Field(description="What was found, what was expected, and what to do.")
    errors: list[FieldProblem] | None = None


class PredictionBatch(BaseModel):
    """One result per image, in the order of the request."""

    results: list[Prediction | ProblemDetails] = Field(description="A prediction, or the error of an invalid image.")
