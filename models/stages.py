"""The stages of a trunk, from its stem to its last blocks."""

from __future__ import annotations

from torch import nn

from camcal.models.resnet_cifar import CifarResNet


def stages(trunk: nn.Module) -> dict[str, int]:
    """The stage of each parameter by its name; the stem is stage 0.

    The stages of timm's networks are those of its `group_matcher`; a transformer's are its blocks.

    Raises:
        ValueError: if timm does not know the stages of a network.
    """
    names = [name for name, _ in trunk.named_parameters()]
    if isinstance(trunk, CifarResNet):
        per_stage = len(trunk.blocks) // 3
        return {name: 1 + int(name.split(".")[1]) // per_stage if name.startswith("blocks.") else 0 for name in names}
    if isinstance(trunk, nn.Sequential):  # a ResNet's: four layers of the stem, then four stages
        per_stage = (len(trunk) - 4) // 4
        return {name: max(0, 1 + (int(name.partition(".")[0]) - 4) // per_stage) for name in names}
    from timm.models import group_parameters  # takes a second to import

    from camcal.models.timm_trunk import TimmTrunk

    assert isinstance(trunk, TimmTrunk)
    if not hasattr(trunk.network, "group_matcher"):
        raise ValueError(f"timm does not know the stages of {type(trunk.network).__name__}")
    matcher = trunk.network.group_matcher(coarse=True)  # type: ignore[operator]
    found: dict[str, int] = group_parameters(trunk.network, matcher, reverse=True)
    return {f"network.{name}": stage for name, stage in found.items()}
