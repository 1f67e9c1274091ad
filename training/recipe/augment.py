"""Section `augment`: random changes to training images."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from camcal.training.recipe.section import Section

Policy = Literal["none", "autoaugment-cifar10", "autoaugment-imagenet", "trivialaugment"]


class AugmentConfig(Section):
    """Random changes to training images; the defaults change nothing.

    For decoded images, geometry is one resampling; with source `list` crops are cut from the file.
    """

    flip: bool = Field(default=False, description="Mirror half of the images left to right.")
    shift: int = Field(default=0, ge=0, description="Move images by up to this many pixels each way (pad and crop).")
    area: tuple[float, float] = Field(
        default=(1.0, 1.0), description="Range of the share of the image's area that is kept by a random crop."
    )
    aspect: tuple[float, float] = Field(
        default=(1.0, 1.0),
        description="Range of the crop's ratio of width to height. A wide or high crop of nearly the whole image goes "
        "beyond it, and shows `fill` there; with source `list` it stays inside.",
    )
    rotate: float = Field(default=0.0, ge=0, le=180, description="Rotate by up to this many degrees either way.")
    fill: Literal["zero", "mirror", "random"] = Field(
        default="zero",
        description="What is shown outside the image; `random` is mirror or a random plain colour, drawn per image.",
    )
    policy: Policy = Field(
        default="none",
        description="A published policy of operations: AutoAugment (arXiv 1805.09501) or TrivialAugment "
        "(arXiv 2103.10158).",
    )
    erase: float = Field(
        default=0.0, ge=0, lt=1, description="Side of a square that is blanked, as a share of the image's (Cutout)."
    )
    erase_fill: Literal["grey", "black"] = Field(
        default="grey", description="The colour of that square; black in the codes of BALMS and MARC."
    )
    colour: float = Field(
        default=0.0, ge=0, lt=1, description="Strength of random changes to brightness, contrast and saturation."
    )
    mixup: float = Field(
        default=0.0,
        ge=0,
        description="α of mixup's Beta distribution (arXiv 1710.09412), 0 for none. With `cutmix` too, each batch "
        "takes one of the two.",
    )
    cutmix: float = Field(
        default=0.0, ge=0, description="α of CutMix's Beta distribution (arXiv 1905.04899), 0 for none."
    )

    @model_validator(mode="after")
    def _ranges(self) -> AugmentConfig:
        for name in ("area", "aspect"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be a range [low, high] with 0 < low <= high, got [{low}, {high}]")
        return self
