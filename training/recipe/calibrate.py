"""Section `calibrate`: the steps after training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from camcal.training.recipe.section import Section


class CalibrateConfig(Section):
    """The steps after training: scalar, margins and temperature.

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
    method: Literal["auto", "temperature", "lean", "marc", "shrunk"] = Field(
        default="auto",
        description="What is fitted after the scalar. `temperature`: the confidence (1 number); the logarithm of the "
        "class prior that training implies is subtracted. `lean`: how far that was too little or too much as well (2 "
        "numbers). `marc`: a scale and a shift per class, fitted on training images (MARC, arXiv 2112.07225). "
        "`shrunk`: a scale and a shift per class, fitted on held-out images and pulled towards `lean`. `auto` takes "
        "the one with the best cross-fitted, class-balanced likelihood on held-out images, or one with fewer numbers "
        "that is within a standard error of it. It leaves out `marc` where loss or sampler balance the classes "
        "already or a linear head is rescaled, and `shrunk` where held-out logits have more than 2^25 values.",
    )
    marc_on: Literal["train", "both"] = Field(
        default="train",
        description="The images that MARC's margins are fitted on: those of training, as published, or held-out ones "
        "as well, with a penalty towards logit adjustment.",
    )
    marc_lean: bool = Field(
        default=False, description="After MARC's margins, fit the lean together with the temperature."
    )
    penalty: float | None = Field(
        default=None,
        ge=0,
        description="λ, which pulls margins towards their start. By default chosen by cross-fitting, and 0 for "
        '`marc_on = "train"`, as published.',
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
