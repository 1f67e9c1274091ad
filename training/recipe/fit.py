"""Section `fit`: the optimisation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from camcal.training.recipe.section import Section

Sampler = Literal["instance", "class_balanced", "square_root", "progressive"]


class FitConfig(Section):
    """The optimisation: SGD with Nesterov momentum, a linear warm-up, then a cosine to zero.

    mode: `all` trains the whole network. `frozen` keeps the trunk as its pretrained weights have it and trains what
        follows, on maps of the images as they are and, with augment.flip, mirrored: they are computed once and kept,
        see `camcal.training.data.features`. `head-then-all` does the one for head_epochs, at head_lr, and then the
        other.
    trunk_lr: the share of the learning rate at which the trunk learns.
    milestones: instead of the cosine, the epochs from which on the rate is a tenth of what it was before.
    batch_size: of all processes together.
    sampler: how often a class is seen; see `camcal.training.fitting.samplers`.
    precision: `bf16` and `fp16` run the network under autocast; head, maps and loss stay in fp32. `fp16` is for GPUs
        without bf16; its gradients are scaled, see `camcal.training.fitting.descent`.
    compile: compile the network first, which takes about a minute; on a GPU it then runs as CUDA graphs. It decides
        the speed alone: a run may go on with or without it.
    """

    epochs: int = Field(ge=1)
    batch_size: int = Field(default=128, ge=2)
    lr: float = Field(default=0.1, gt=0)
    warmup_epochs: float = Field(default=5.0, ge=0)
    milestones: list[Annotated[float, Field(gt=0)]] = []
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    sampler: Sampler = "instance"
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    compile: bool = False
    mode: Literal["all", "frozen", "head-then-all"] = "all"
    head_epochs: int = Field(default=8, ge=1)
    head_lr: float = Field(default=0.03, gt=0)
    trunk_lr: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _milestones_are_met(self) -> FitConfig:
        if late := [milestone for milestone in self.milestones if milestone >= self.epochs]:
            raise ValueError(
                f"milestones must lie before the last epoch, or the rate would stay high to the end: {late[0]:g} does "
                f"not with epochs = {self.epochs}; set both"
            )
        if self.milestones != sorted(set(self.milestones)):
            raise ValueError(f"milestones must rise from one to the next, got {self.milestones}")
        return self
