"""Section `calibrate`: the steps after training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from camcal.training.recipe.section import Section


class CalibrateConfig(Section):
    """The steps after training: scalar, margins, lean and temperature.

    They take seconds, and `camcal calibrate` repeats them.
    """

    views: Literal["one", "flip"] = Field(
        default="one",
        description="What of an image the finished network looks at: `one`, the image as it is; or `flip`, its mirror "
        "image as well, and takes the mean of both logits. Predictions then take twice as long.",
    )
    scalar: Literal["select", "keep"] = Field(
        default="select",
        description="`select` the scalar of a normalised head on held-out images, or `keep` the trained one.",
    )
    spread: float = Field(
        default=0.3,
        ge=1e-3,
        description="Standard deviation of the prior on the fits to few images: of the logarithm of the scalar's and "
        "the temperature's factor around 1, and of the lean around 0.",
    )
    rescale: Literal["off", "tau", "lws"] = Field(
        default="off",
        description="For a linear head: `tau` divides the weights by ‖W‖^τ, `lws` learns a scale per class "
        "(arXiv 1910.09217).",
    )
    tau: float | None = Field(
        default=None, ge=0, le=2, description='τ of `rescale = "tau"`; by default chosen on held-out images.'
    )
    marc: bool = Field(default=True, description="Fit margins (MARC, arXiv 2112.07225).")
    marc_on: Literal["train", "holdout", "both"] = Field(
        default="train", description="The images that margins are fitted on; the paper takes those of training."
    )
    start: Literal["identity", "prior"] | None = Field(
        default=None,
        description="Where margins start, and stay without `marc`: `identity`, or `prior`, which subtracts the "
        'logarithm of the class prior from the logits. By default `identity` for `marc_on = "train"` and after '
        "rescaling, otherwise `prior`.",
    )
    penalty: float | None = Field(
        default=None,
        ge=0,
        description='λ, which pulls margins towards their start. By default 0 for `marc_on = "train"`, otherwise '
        "chosen by cross-validation.",
    )
    lean: bool = Field(
        default=False,
        description="Fit on held-out images, with the temperature, how far the logits still lean to the common "
        "classes, and correct it.",
    )
    passes: int = Field(
        default=4, ge=1, description="Augmented passes over the training images that MARC's cached logits come from."
    )
    exponent: float = Field(default=1.2, ge=0, le=10, description="Exponent of MARC's class weights, w ∝ n^-exponent.")
    iterations: int = Field(default=2000, ge=1, description="Steps of SGD, with a cosine rate.")
    warmup: int = Field(default=0, ge=0, description="Steps over which the rate rises from half, at most half of all.")
    batch_size: int = Field(default=512, ge=1, description="Logits per step.")
    lr: float = Field(default=0.05, gt=0, description="The highest learning rate.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum of SGD.")
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay of SGD.")
    refit: bool = Field(
        default=False,
        description="Once scalar and temperature are fitted, train again on all images, held-out ones too, and fit "
        "margins to that network. Training takes twice as long.",
    )
    prior: list[float] | dict[str, float] | None = Field(
        default=None,
        description="Class frequencies expected in use, beside balanced and training frequencies: a positive number "
        "per class, as a list in the classes' order or by name.",
    )

    @field_validator("prior", mode="before")
    @classmethod
    def _list_or_table(cls, found: object) -> object:
        if found is not None and not isinstance(found, (list, dict)):
            raise ValueError("must be a list of numbers in the classes' order, or a table of them by class name")
        return found
