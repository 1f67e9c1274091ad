"""Section `fit`: the optimisation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from camcal.training.recipe.section import Section

Sampler = Literal["instance", "class_balanced", "square_root", "progressive"]


class FitConfig(Section):
    """The optimisation: SGD or AdamW, a linear warm-up, then a cosine to zero."""

    epochs: int = Field(ge=1, description="How often the training images are gone through.")
    least_steps: int = Field(
        default=0,
        ge=0,
        description="Raise `epochs`, and `head_epochs` likewise, until there are this many batches, so that small data "
        "sets are trained long enough.",
    )
    batch_size: int = Field(default=128, ge=2, description="Images per batch, of all processes together.")
    lr: float = Field(default=0.1, gt=0, description="The highest learning rate.")
    warmup_epochs: float = Field(default=5.0, ge=0, description="Epochs of a linear rise to it, at most half of all.")
    milestones: list[Annotated[float, Field(gt=0)]] = Field(
        default=[], description="Epochs at which the rate is divided by ten, in place of the cosine."
    )
    optimizer: Literal["sgd", "adamw"] = Field(
        default="sgd",
        description="`sgd` with Nesterov momentum, or `adamw` (arXiv 1711.05101) with torch's other defaults, whose "
        "`lr` must be lower: 0.001 or less is usual.",
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum of SGD.")
    weight_decay: float = Field(default=5e-4, ge=0, description="Weight decay; single numbers are not decayed.")
    sampler: Sampler = Field(
        default="instance",
        description="How often each class is seen: once per image, equally often, by the square root of its images, or "
        "from the first to the second over the epochs.",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="bf16",
        description="Arithmetic of the network; head, maps and loss are always fp32. `fp16` is for GPUs without bf16.",
    )
    compile: bool = Field(
        default=False,
        description="Compile the network first, which takes about a minute. It changes the speed only: a run may "
        "resume with or without it.",
    )
    mode: Literal["all", "frozen", "head-then-all"] = Field(
        default="all",
        description="`all` trains the whole network. `frozen` keeps the pretrained trunk and trains what follows, on "
        "maps computed once. `head-then-all` does the second for `head_epochs`, and then the first.",
    )
    head_epochs: int = Field(default=8, ge=1, description="Epochs of the first part of `head-then-all`.")
    head_lr: float = Field(default=0.03, gt=0, description="Its learning rate.")
    trunk_lr: float = Field(default=1.0, gt=0, le=1, description="Learning rate of the trunk, as a share of `lr`.")
    layer_decay: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Each stage of the trunk, or block of a transformer, learns at this share of the rate of the next; "
        "the last one at that of `trunk_lr`.",
    )
    frozen_stages: int = Field(
        default=0,
        ge=0,
        description="How many of the trunk's first stages keep their pretrained weights and batch statistics; the stem "
        "counts as one.",
    )
    lora: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="Rank of low-rank adaptation (LoRA, arXiv 2106.09685): the pretrained trunk keeps its weights, and "
        "each linear layer learns a product of two thin matrices that is added to its own. For transformers; 0 for "
        "none.",
    )
    ema: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Decay per step of an exponential moving average of the weights, such as 0.999; 0 for none. The "
        "average is what is calibrated, evaluated and exported. Its decay rises from 0 over the first steps.",
    )

    @model_validator(mode="after")
    def _rate_suits_the_optimizer(self) -> FitConfig:
        if self.optimizer == "adamw" and self.lr >= 0.1:
            raise ValueError(
                f"optimizer = 'adamw' needs a rate below 0.1, such as lr = 0.001: lr is {self.lr:g}, which is for SGD"
            )
        return self

    @model_validator(mode="after")
    def _milestones_are_met(self) -> FitConfig:
        if late := [milestone for milestone in self.milestones if milestone >= self.epochs]:
            raise ValueError(
                f"milestones must be before the last epoch, or the rate stays high to the end: {late[0]:g} is not with "
                f"epochs = {self.epochs}; set both"
            )
        if self.milestones and self.least_steps:
            raise ValueError("milestones are for a fixed number of epochs: leave least_steps out")
        if self.milestones != sorted(set(self.milestones)):
            raise ValueError(f"milestones must increase, got {self.milestones}")
        return self
