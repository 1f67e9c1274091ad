"""Section `model`: the network."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from camcal.training.recipe.section import Section


def first_scalar(head: str) -> float:
    """Initial s of a normalised head where none is given."""
    return 1.0 if head == "weight" else 16.0


class ModelConfig(Section):
    """The network."""

    backbone: str = Field(
        default="resnet32",
        description="The trunk: `resnet8`, `resnet20`, `resnet32` for 32-pixel images; `resnet32_wide`, "
        "which is four times as wide, for comparisons with GLMC and SURE; `resnet18_slim` for small "
        "photographs; torchvision's `resnet18`, `resnet50`, `resnet152`, `resnext50_32x4d`, `resnext101_32x8d`; or "
        "`timm/NAME` for any network of timm.",
    )
    weights: str | None = Field(
        default=None,
        description="Pretrained weights. For timm's networks: `pip` (an installed package of weights), `hub` (the "
        "Hugging Face hub), or a `.safetensors` or `.pth` file. For torchvision's: its name, such as `IMAGENET1K_V1`.",
    )
    output_stride: Literal[8, 16] | None = Field(
        default=None,
        description="Pixels of the image per position of the map, in place of the usual 32, by dilated convolutions: a "
        "finer map, and more computation. For torchvision's networks and timm's ResNets, EfficientNets, ConvNeXts and "
        "others.",
    )
    neck: Annotated[int, Field(ge=0, le=8192)] | Literal["last"] = Field(
        default=0,
        description="Channels of a 1×1 convolution with batch normalisation and ReLU after the trunk, 0 for none. "
        "`last`: the one that a timm EfficientNet ends in, trained even where the trunk is frozen.",
    )
    head: Literal["linear", "weight", "cosine", "cosnorm", "causal"] = Field(
        default="cosine",
        description="The classifier: `linear`, or normalised: `weight` (only the weights), `cosine` (weights and "
        "features), `cosnorm` (arXiv 1904.05160), `causal` (arXiv 2009.12991).",
    )
    scalar: float = Field(
        default=16.0, gt=0, description="The scalar s of a normalised head at the start; 1 by default for `weight`."
    )
    learn_scalar: bool = Field(default=True, description="Train the scalar with the weights.")
    camc: Literal["off", "weights", "prototypes", "both", "taught"] = Field(
        default="off",
        description="Class activation map calibration: the evidence that its attention comes from, or `taught`, its "
        "second form.",
    )
    camc_attention: Literal["sigmoid", "softmax"] = Field(
        default="sigmoid", description="How CAMC turns correlation into attention."
    )
    camc_top: int = Field(
        default=0, ge=0, description="How many of the most probable classes CAMC's evidence is made of; 0 for all."
    )
    reslt: Literal["off", "cifar", "large", "large-official"] = Field(
        default="off",
        description="ResLT's residual branches (arXiv 2101.10633): three batch normalisations, as for CIFAR, or a "
        "convolution, as for large networks. `large-official` pools before its ReLU in evaluation, as the authors' "
        "code does.",
    )

    @model_validator(mode="before")
    @classmethod
    def _scalar_of_head(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("head") == "weight":
            return {"scalar": first_scalar("weight")} | raw
        return raw
