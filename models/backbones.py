"""Backbones by name: a trunk that turns images into a feature map, and the number of its channels.

torch is imported where a network is built: recipes check the names without it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from torch import nn

Backbone: TypeAlias = "tuple[nn.Module, int]"

STRIDED = (
    "that is for torchvision's networks, and for those of timm that can dilate their convolutions, such as ResNets, "
    "EfficientNets and ConvNeXts. A larger data.input_size gives any network a finer map"
)
"""Which networks have an output stride, for errors."""


def _cifar(name: str, depth: int, first: int, weights: str | None, output_stride: int | None) -> Backbone:
    from camcal.models.resnet_cifar import CifarResNet

    _check_plain(name, weights, output_stride)
    return (trunk := CifarResNet(depth, first)), trunk.width


def _check_plain(name: str, weights: str | None, output_stride: int | None) -> None:
    if weights is not None:
        raise ValueError(f"{name} has no pretrained weights")
    if output_stride is not None:
        raise ValueError(f"{name} has no output_stride: {STRIDED}")


def _torchvision(name: str, weights: str | None, output_stride: int | None) -> Backbone:
    """A torchvision ResNet without pooling and classifier; the map is 32 times smaller than the image by default."""
    from torch import hub, nn
    from torchvision.models import get_model, get_model_weights
    from torchvision.models.resnet import ResNet

    known = get_model_weights(name)
    try:
        chosen = known.verify(weights)
    except KeyError:
        raise ValueError(f"{name} has no weights {weights!r}; known: {', '.join(known.__members__)}") from None
    try:
        network = get_model(name, weights=chosen)
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:  # KeyError: a file of zeros
        reason = str(error).partition("\n")[0]
        where = f"{hub.get_dir()}/checkpoints"
        raise ValueError(
            f"the weights {weights!r} of {name} cannot be fetched into {where} or read from there: {reason}"
        ) from None
    assert isinstance(network, ResNet)
    width: int = network.fc.in_features
    last = {None: [], 16: [network.layer4], 8: [network.layer3, network.layer4]}[output_stride]
    for i, stage in enumerate(last):
        _dilate(stage, 2**i)
    return nn.Sequential(*list(network.children())[:-2]), width


def _dilate(stage: nn.Module, before: int) -> None:
    """Drop the stride of a ResNet's stage, and let its convolutions reach as far as with it (à trous).

    At every second position the map then stays as it was.

    Args:
        before: dilation of the convolutions before the stride.
    """
    from torch import nn

    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            dilation = before if module.stride == (2, 2) else 2 * before
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.dilation = module.padding = (dilation, dilation)


def _slim(weights: str | None, output_stride: int | None) -> Backbone:
    """ResNet-18 at half width whose last stage keeps its resolution: 2.8 million parameters, a map 16 times smaller.

    For small photographs: 112 pixels give a 7×7 map.
    """
    from torch import nn
    from torchvision.models.resnet import BasicBlock

    _check_plain("resnet18_slim", weights, output_stride)
    layers: list[nn.Module] = [
        nn.Conv2d(3, 32, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]
    inputs = 32
    for width, stride in ((32, 1), (64, 2), (128, 2), (256, 1)):
        shortcut = None
        if width != inputs:
            shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width))
        layers += [BasicBlock(inputs, width, stride, shortcut), BasicBlock(width, width)]
        inputs = width
    trunk = nn.Sequential(*layers)
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return trunk, inputs


_BUILDERS: dict[str, Callable[[str | None, int | None], Backbone]] = {
    **{name: partial(_cifar, name, depth, 16) for name, depth in (("resnet8", 8), ("resnet20", 20), ("resnet32", 32))},
    "resnet32_wide": partial(_cifar, "resnet32_wide", 32, 64),
    "resnet18_slim": _slim,
    **{
        name: partial(_torchvision, name)
        for name in ("resnet18", "resnet50", "resnet152", "resnext50_32x4d", "resnext101_32x8d")
    },
}

BACKBONES = tuple(_BUILDERS)


def check_backbone(name: str) -> None:
    """Raises ValueError unless `name` is one of `BACKBONES`, or `timm/` and a network of timm's."""
    if name.startswith("timm/"):
        from camcal.models.timm_trunk import check_name  # timm takes a second to import

        check_name(name.removeprefix("timm/"))
    elif name not in _BUILDERS:
        raise ValueError(f"unknown backbone {name!r}; known: {', '.join(BACKBONES)}, and timm/NAME for any of timm's")


def inputs_of(name: str) -> dict[str, Any]:
    """Mean, std and interpolation that the pretrained weights of `timm/NAME` expect, by their keys in a recipe.

    Empty for other backbones: torchvision's expect the defaults.
    """
    if not name.startswith("timm/"):
        return {}
    from camcal.models import timm_trunk

    return timm_trunk.inputs_of(name.removeprefix("timm/"))._asdict()


def build_backbone(
    name: str, weights: str | None = None, size: int = 224, output_stride: Literal[8, 16] | None = None
) -> Backbone:
    """The trunk called `name` and its feature width C: images B×3×H×W to features B×C×h×w.

    Args:
        name: one of `BACKBONES`, or `timm/NAME`.
        weights: for torchvision's networks its name of pretrained weights, such as `IMAGENET1K_V1`; for timm's see
            `build_timm`; None starts from scratch.
        size: side of the images, px, which some of timm's networks are built for.
        output_stride: pixels of the image per position of the map, by dilation in place of the last strides; by default
            the network's own.

    Raises:
        ValueError: if the name or the weights are unknown, the weights cannot be fetched or read, or the network has
            no `output_stride`.
    """
    check_backbone(name)
    if name.startswith("timm/"):
        from camcal.models.timm_trunk import build_timm

        return build_timm(name.removeprefix("timm/"), weights, size, output_stride)
    return _BUILDERS[name](weights, output_stride)
