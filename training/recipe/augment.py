"""Section `augment`: random changes to training images."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from camcal.training.recipe.section import Section

Policy = Literal["none", "autoaugment-cifar10", "autoaugment-imagenet", "trivialaugment"]


class AugmentConfig(Section):
    """Random changes to training images; the defaults change nothing.

    flip: mirror half of them.
    shift: move by up to this many pixels each way (pad and crop).
    area: range of the share of the image that is kept; aspect: range of its width to height ratio. Where images are
        decoded as they are needed (`list`) the part lies within the image; otherwise a wide or high one of nearly the
        whole image goes beyond it, and `fill` shows there.
    rotate: up to this many degrees either way.
    fill: what is shown outside the image: `zero`, `mirror`, or `random` (mirror or a random plain colour, per image).
    policy: a published policy of operations on grey levels and geometry; see `camcal.training.data.policies`.
    erase: side of a square that is blanked, as a share of the image's (Cutout, arXiv 1708.04552).
    colour: strength of changes to brightness, contrast and saturation.
    mixup, cutmix: parameter of the Beta distribution that says how much of another image is mixed in, 0 for none; with
        both, each batch takes one of the two. See `camcal.training.data.mix`.
    """

    flip: bool = False
    shift: int = Field(default=0, ge=0)
    area: tuple[float, float] = (1.0, 1.0)
    aspect: tuple[float, float] = (1.0, 1.0)
    rotate: float = Field(default=0.0, ge=0, le=180)
    fill: Literal["zero", "mirror", "random"] = "zero"
    policy: Policy = "none"
    erase: float = Field(default=0.0, ge=0, lt=1)
    colour: float = Field(default=0.0, ge=0, lt=1)
    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _ranges(self) -> AugmentConfig:
        for name in ("area", "aspect"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be a range [low, high] with 0 < low <= high, got [{low}, {high}]")
        return self
