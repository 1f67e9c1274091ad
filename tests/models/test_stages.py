import pytest
from torch import nn

from camcal.models.backbones import build_backbone
from camcal.models.stages import stages


@pytest.mark.parametrize(
    ("name", "firsts"),
    [
        ("resnet8", ["conv1.weight", "blocks.0.conv1.weight", "blocks.1.conv1.weight", "blocks.2.conv1.weight"]),
        ("resnet20", ["conv1.weight", "blocks.0.conv1.weight", "blocks.3.conv1.weight", "blocks.6.conv1.weight"]),
        ("resnet18", ["0.weight", "4.0.conv1.weight", "5.0.conv1.weight", "6.0.conv1.weight", "7.0.conv1.weight"]),
        ("resnet18_slim", ["0.weight", "4.conv1.weight", "6.conv1.weight", "8.conv1.weight", "10.conv1.weight"]),
        (
            "timm/test_resnet",
            ["network.conv1.0.weight", *(f"network.layer{i}.0.conv1.weight" for i in range(1, 5))],
        ),
        ("timm/test_vit", ["network.cls_token", *(f"network.blocks.{i}.norm1.weight" for i in range(6))]),
    ],
)
def test_stages_begin_where_the_network_s_own_do(name: str, firsts: list[str]) -> None:
    trunk, _ = build_backbone(name, None, 64)
    found = stages(trunk)
    names = [name for name, _ in trunk.named_parameters()]
    assert set(found) == set(names)
    assert [next(n for n in names if found[n] == stage) for stage in range(max(found.values()) + 1)] == firsts
    in_order = [found[n] for n in names]
    assert in_order == sorted(in_order)


def test_a_network_whose_stages_are_unknown_is_refused() -> None:
    trunk, _ = build_backbone("timm/test_resnet", None, 64)
    trunk.network = nn.Conv2d(3, 8, 1)
    with pytest.raises(ValueError, match="timm does not know the stages of Conv2d"):
        stages(trunk)
