"""`report.json`: what was measured of a calibrated network, and how it was made. Nothing here needs torch.

All accuracies, shares and errors are fractions of one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Step = Literal["trained", "adjusted", "scalar", "marc", "calibrated"]
"""`adjusted` stands beside the others: trained logits with the selected scalar, minus the log of their class prior."""
PriorStep = Literal["trained", "scalar", "calibrated"]

Method = Literal["temperature", "lean", "marc", "shrunk"]
"""A calibration after the scalar, from one number to 2K; see the recipe's `calibrate.method`."""


class ReportError(ValueError):
    """A file that is not a report."""


class ReliabilityBin(BaseModel):
    """The test answers whose confidence is above `low` and at most `high`."""

    low: float
    high: float
    share: float = Field(description="Of all answers.")
    confidence: float | None = Field(description="Their mean; null if there are none.")
    accuracy: float | None = Field(description="The share of them that is right.")


class CalibrationErrors(BaseModel):
    """Expected calibration error of some answers, 15 bins, with what few images do to it."""

    ece: float = Field(
        description="Expected calibration error, 15 bins of equal width. Chance alone makes it positive."
    )
    ece_by_chance: float = Field(description="The ECE that would be expected if the probabilities were perfect.")
    ece_debiased: float = Field(description="The ECE less its bias on so few images, at least 0.")
    ece_interval: tuple[float, float] = Field(
        description="A 95 % bootstrap interval of the error on endlessly many images; often below `ece`, never below 0."
    )


class GroupCalibration(CalibrationErrors):
    """The test answers that name a class of one group."""

    share: float = Field(description="Of all answers.")
    confidence: float = Field(description="Their mean.")
    accuracy: float = Field(description="The share of them that is right.")


class ServedReport(BaseModel):
    """The part of a bundle's report that a service passes on to clients; the rest is ignored, and may be anything."""

    reliability: dict[str, list[ReliabilityBin]] | None = None
    by_predicted_group: dict[str, dict[str, GroupCalibration | None]] | None = None


class Made(BaseModel):
    """The code and the machine that made something."""

    version: str
    commit: str | None
    hardware: str
    date: str


class DataSummary(BaseModel):
    """The images and classes of a run; `largest_class` and `smallest_class` count training images."""

    classes: int
    train: int
    holdout: int
    test: int
    largest_class: int
    smallest_class: int
    groups: dict[str, int] = Field(description="Classes with many, medium and few training images.")


class Figures(CalibrationErrors):
    """Accuracy and calibration of one set of probabilities."""

    accuracy: float
    groups: dict[str, float | None] = Field(description="Mean accuracy of the group's classes; null if it has none.")
    classwise_ece: float
    nll: float
    brier: float


class CandidateFigures(BaseModel):
    """What a calibration that was compared gives on the test images. The choice was made without them."""

    test: Figures
    test_under_train_prior: Figures


class TemperatureOnly(BaseModel):
    """Figures with a temperature fitted on held-out images, but without MARC."""

    temperature: float
    test: Figures
    test_under_train_prior: Figures


class RankGroups(BaseModel):
    """Mean accuracy of the classes grouped by rank: head, middle, tail."""

    sizes: dict[str, int]
    test: dict[Step, dict[str, float | None]]


class _Named(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    name: str = Field(alias="class")


class ClassFigures(_Named):
    """One class: accuracy, and margin d_y = z_y/‖W_y‖ of its test images (mean and standard deviation).

    Figures are null for a class without test images.
    """

    train_count: int
    test_count: int | None = Field(default=None, exclude_if=lambda found: found is None)
    group: str
    accuracy_trained: float | None
    margin_trained: float | None
    margin_spread_trained: float | None
    accuracy_calibrated: float | None
    margin_calibrated: float | None
    margin_spread_calibrated: float | None


class Confusion(_Named):
    """A class that images of another are mistaken for, and the share of those images."""

    share: float


class WorstClass(_Named):
    """A class of low accuracy, and what its images are mistaken for, most frequent first."""

    accuracy: float
    taken_for: list[Confusion]


class CurvePoint(BaseModel):
    """Figures at one scalar; `adjusted_…` with the class prior taken out, `holdout_…` on held-out images."""

    scalar: float
    accuracy: float
    ece: float
    nll: float
    adjusted_accuracy: float
    adjusted_ece: float
    adjusted_nll: float
    holdout_accuracy: float
    holdout_ece: float
    holdout_nll: float
    holdout_adjusted_accuracy: float
    holdout_adjusted_ece: float
    holdout_adjusted_nll: float


class TauPoint(BaseModel):
    """Class-balanced figures of held-out images at one τ."""

    tau: float
    accuracy: float
    nll: float


class Candidate(BaseModel):
    """A calibration that was fitted: softmax((ω_k·z_k + offset_k)/T) for the balanced prior, z after the scalar.

    It is judged on held-out images, each by a calibration that was fitted without it; class-balanced.
    """

    model_config = ConfigDict(frozen=True)

    method: Method
    numbers: int = Field(description="How many were fitted, the scalar not counted.")
    nll: float | None = Field(description="Cross-fitted, in nats; null with fewer than two held-out images.")
    loss: float | None = Field(description="The same with one image more, of a random label: by this it is judged.")
    difference: float | None = Field(description="From the loss of the calibration that is served.")
    standard_error: float | None = Field(description="Of the difference.")
    lean: float = Field(description="δ, 0 where it was not fitted.")
    penalty: float = Field(description="λ of the margins.")
    temperature: float = Field(description="T of probabilities for the balanced prior.")
    prior_temperatures: dict[str, float] = Field(description="T for the other priors, by name.")
    omega: list[float] = Field(description="ω of each class.")
    offset: list[float] = Field(description="The offset of each class; MARC's is β_k‖W_k‖.")


class FittedCalibration(BaseModel):
    """What calibration found."""

    model_config = ConfigDict(frozen=True)

    trained_scalar: float = Field(description="s as trained.")
    scalar: float = Field(description="s as selected.")
    method: Method = Field(description="What is served.")
    candidates: list[Candidate] = Field(description="What was fitted; of `calibrate.method = auto`, all it compared.")
    lean: float = Field(description="δ, 0 where it was not fitted.")
    tau: float | None = Field(description="τ of τ-normalisation, if used.")
    tau_curve: list[TauPoint] = Field(description="Each τ that was tried.")
    temperature: float = Field(description="T of probabilities for the balanced prior.")
    prior_temperatures: dict[str, float] = Field(description="T for the other priors, by name.")
    logit_prior: list[float] = Field(description="The class prior that the trained logits are for.")
    penalty: float = Field(description="λ of the margins.")
    omega_at_bound: int = Field(description="Classes whose ω reached its lower bound.")
    map_shift: float = Field(description="Positions by which maps lie right of and below what they show.")
    train_accuracy: float | None = Field(description="On cached training logits, if MARC or LWS used them.")
    logits_s: float = Field(description="Seconds spent computing logits; 0 if they were cached.")
    fits_s: float = Field(description="Seconds spent on everything else.")
    warnings: list[str]


class TeacherFacts(BaseModel):
    """A network that another one was distilled from."""

    weights: str = Field(description="Digest of its weights.")
    recipe: dict[str, Any]


class HeldOut(BaseModel):
    """Top-1 accuracy and ECE on held-out images."""

    accuracy: float
    ece: float


class Report(BaseModel):
    """Everything that `report.json` holds.

    Optional fields are left out of the file where they do not apply. `test…` and `reliability…` have figures for each
    step of calibration, with the test images weighted to the prior that they are named after.
    """

    recipe: str = Field(description="Its name.")
    seed: int
    settings: dict[str, Any] = Field(description="The whole recipe, without the places of data and weights.")
    made_with: Made = Field(description="Of the evaluation.")
    data: DataSummary
    test: dict[Step, Figures]
    test_under_train_prior: dict[PriorStep, Figures]
    effective_size: float = Field(
        description="The effective number of test images for the balanced prior: (Σw)²/Σw² of their weights."
    )
    candidates: dict[Method, CandidateFigures] = Field(
        description="The calibrations in `calibration.candidates` on the test images, which had no part in the choice."
    )
    temperature_only: dict[Literal["scalar", "adjusted"], TemperatureOnly]
    rank_groups: RankGroups
    by_predicted_group: dict[Literal["trained", "calibrated"], dict[str, GroupCalibration | None]]
    reliability: dict[Step, list[ReliabilityBin]]
    reliability_under_train_prior: dict[PriorStep, list[ReliabilityBin]]
    per_class: list[ClassFigures]
    worst_classes: list[WorstClass]
    test_under_given_prior: dict[Literal["calibrated"], Figures] | None = Field(
        default=None, exclude_if=lambda found: found is None
    )
    scalar_curve: list[CurvePoint] | None = Field(default=None, exclude_if=lambda found: found is None)
    calibration: FittedCalibration
    epochs: int
    trained_with: list[Made] = Field(default=[], exclude_if=lambda found: not found)
    teachers: list[TeacherFacts] = Field(default=[], exclude_if=lambda found: not found)
    held_out: dict[str, HeldOut] | None = Field(
        default=None,
        exclude_if=lambda found: found is None,
        description="Of a bundle whose precision is not fp32: what it loses, by precision.",
    )

    def to_json(self) -> dict[str, Any]:
        """The content of `report.json`."""
        return self.model_dump(mode="json", by_alias=True)

    @classmethod
    def read(cls, path: Path) -> Report:
        """The report in a file. Raises ReportError if it is missing or damaged."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise ReportError(f"{path} is missing") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ReportError(f"{path} is not a report: {where or 'the file'}: {first['msg']}") from None
