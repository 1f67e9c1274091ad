"""Section `loss`: the training loss."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from camcal.training.recipe.section import Section


class LossConfig(Section):
    """The training loss; see `camcal.training.fitting.losses` for the formulas. n_k: training images of a class.

    name: what is computed of an image: `cross_entropy`; `focal`, with gamma; `ldam`, with the largest margin `margin`,
        for normalised heads; `balanced_softmax`; `logit_adjustment`, with the strength tau.
    weights: of a class: `none`; `grw` ∝ n^-exponent; `class_balanced` ∝ (1-β)/(1-β^n) with β = effective_beta.
    reweight_from: share of the epochs after which the weights apply; 0.8 is LDAM-DRW's 160 of 200.
    smoothing: label smoothing; with smoothing_tail, that of the commonest class, which falls to it for the rarest.
    branch_beta: with ResLT, the share of the branches' own losses; the rest is the loss of their sum.
    branch_ranks: with ResLT, the ranks (0 is the commonest class) from which on a class is medium, and rare; by default
        35 % and 70 % of the classes.
    """

    name: Literal["cross_entropy", "focal", "ldam", "balanced_softmax", "logit_adjustment"] = "cross_entropy"
    weights: Literal["none", "grw", "class_balanced"] = "none"
    reweight_from: float = Field(default=0.0, ge=0, lt=1)
    exponent: float = Field(default=1.2, ge=0, le=10)
    effective_beta: float = Field(default=0.9999, ge=0, lt=1)
    gamma: float = Field(default=2.0, ge=0)
    margin: float = Field(default=0.5, gt=0)
    tau: float = Field(default=1.0, ge=0, le=10)
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    smoothing_tail: float | None = Field(default=None, ge=0, lt=1)
    branch_beta: float = Field(default=0.995, ge=0, le=1)
    branch_ranks: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _in_order(self) -> LossConfig:
        if self.smoothing_tail is not None and self.smoothing_tail > self.smoothing:
            raise ValueError(
                f"smoothing_tail must be at most smoothing, which the commonest class has: got {self.smoothing_tail:g} "
                f"and {self.smoothing:g}"
            )
        if self.branch_ranks is not None and not 0 <= self.branch_ranks[0] <= self.branch_ranks[1]:
            raise ValueError(f"branch_ranks must be two ranks in order, got {list(self.branch_ranks)}")
        return self
