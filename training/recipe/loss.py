"""Section `loss`: the training loss."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from camcal.training.recipe.section import Section


class LossConfig(Section):
    """The training loss. `camcal.training.fitting.losses` has the formulas; n is the number of a class's images."""

    name: Literal["cross_entropy", "focal", "ldam", "balanced_softmax", "logit_adjustment"] = Field(
        default="cross_entropy",
        description="The loss of an image. `ldam` needs a normalised head.",
    )
    weights: Literal["none", "grw", "class_balanced"] = Field(
        default="none",
        description="Class weights: `grw` ∝ n^-exponent (arXiv 2103.16370); `class_balanced` ∝ (1-β)/(1-β^n) with "
        "β = `effective_beta` (arXiv 1901.05555).",
    )
    reweight_from: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the epochs after which the weights apply; 0.8 is LDAM-DRW's 160 of 200.",
    )
    exponent: float = Field(default=1.2, ge=0, le=10, description="Exponent of the weights `grw`.")
    effective_beta: float = Field(default=0.9999, ge=0, lt=1, description="β of the weights `class_balanced`.")
    gamma: float = Field(default=2.0, ge=0, description="γ of the focal loss (arXiv 1708.02002).")
    margin: float = Field(default=0.5, gt=0, description="The largest margin of LDAM (arXiv 1906.07413).")
    tau: float = Field(default=1.0, ge=0, le=10, description="Strength τ of logit adjustment (arXiv 2007.07314).")
    smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Label smoothing; with `smoothing_tail`, that of the most frequent class."
    )
    smoothing_tail: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Label smoothing of the rarest class; between the two it falls with n (arXiv 2104.00466).",
    )
    branch_beta: float = Field(
        default=0.995, ge=0, le=1, description="The share of the branches' own losses; the rest is that of their sum."
    )
    branch_ranks: tuple[int, int] | None = Field(
        default=None,
        description="The ranks (0 is the most frequent class) from which on a class is medium, and rare; by default "
        "35 % and 70 % of the classes.",
    )

    @model_validator(mode="after")
    def _in_order(self) -> LossConfig:
        if self.smoothing_tail is not None and self.smoothing_tail > self.smoothing:
            raise ValueError(
                "smoothing_tail must be at most smoothing, that of the most frequent class: got "
                f"{self.smoothing_tail:g} and {self.smoothing:g}"
            )
        if self.branch_ranks is not None and not 0 <= self.branch_ranks[0] <= self.branch_ranks[1]:
            raise ValueError(f"branch_ranks must be two ranks in order, got {list(self.branch_ranks)}")
        return self
