"""What a bundle's `report.json` tells the service of the model's calibration."""

from __future__ import annotations

from pydantic import BaseModel, Field


class ReliabilityBin(BaseModel):
    """The test answers whose confidence is above `low` and at most `high`."""

    low: float
    high: float
    share: float = Field(description="Of all answers.")
    confidence: float | None = Field(description="Their mean; null if there are none.")
    accuracy: float | None = Field(description="The share of them that is right.")


class GroupCalibration(BaseModel):
    """The test answers that name a class of one group."""

    share: float = Field(description="Of all answers.")
    confidence: float = Field(description="Their mean.")
    accuracy: float = Field(description="The share of them that is right.")
    ece: float = Field(description="Their expected calibration error, 15 bins.")


class ShownReport(BaseModel):
    """What of a bundle's report is passed on to clients; anything else in it is ignored."""

    reliability: dict[str, list[ReliabilityBin]] | None = None
    by_predicted_group: dict[str, dict[str, GroupCalibration | None]] | None = None
