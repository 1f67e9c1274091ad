"""Section `model`: the network."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from camcal.training.recipe.section import Section


def first_scalar(head: str) -> float:
    """s of a normalised head where none is given."""
    return 1.0 if head == "weight" else 16.0


class ModelConfig(Section):
    """The network; see `camcal.models.classifier.LongTailClassifier`.

    backbone: one of `camcal.models.backbones.BACKBONES`, or `timm/NAME` for any network of timm's.
    weights: to start from. For timm's networks `pip`, from an installed package of weights; `hub`, from the Hugging
        Face hub; or a `.safetensors` or `.pth` file. For torchvision's its name of them, such as `IMAGENET1K_V1`.
    neck: channels of a 1×1 convolution with batch normalisation and ReLU behind the trunk, 0 for none; or `last`, the
        one in which an EfficientNet of timm's ends, which then is trained where the trunk is frozen.
    head: `linear`, or a normalised one: `weight`, `cosine`, `cosnorm`, `causal`; see `camcal.models.normalized`.
    scalar: s of a normalised head, at first or, without learn_scalar, for good; 16, or 1 for `weight`.
    camc: where CAMC takes its evidence from, or `taught`, its second form; camc_attention, camc_top: see `CAMC`.
    reslt: the form of ResLT's branches; see `camcal.models.reslt`.
    """

    backbone: str = "resnet32"
    weights: str | None = None
    neck: Annotated[int, Field(ge=0, le=8192)] | Literal["last"] = 0
    head: Literal["linear", "weight", "cosine", "cosnorm", "causal"] = "cosine"
    scalar: float = Field(default=16.0, gt=0)
    learn_scalar: bool = True
    camc: Literal["off", "weights", "prototypes", "both", "taught"] = "off"
    camc_attention: Literal["sigmoid", "softmax"] = "sigmoid"
    camc_top: int = Field(default=0, ge=0)
    reslt: Literal["off", "cifar", "large"] = "off"

    @model_validator(mode="before")
    @classmethod
    def _scalar_of_head(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("head") == "weight":
            return {"scalar": first_scalar("weight")} | raw
        return raw
