import pytest
import torch

from models.backbones import BACKBONES, build_backbone


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [("resnet8", 32, 8), ("resnet32", 32, 8), ("resnet18_slim", 112, 7), ("resnet18", 64, 2), ("resnet50", 64, 2)],
)
def test_a_trunk_returns_a_map_of_the_width_it_names(name: str, size: int, grid: int) -> None:
    trunk, width = build_backbone(name)
    with torch.no_grad():
        assert trunk.eval()(torch.zeros(1, 3, size, size)).shape == (1, width, grid, grid)


def test_the_papers_backbones_are_known() -> None:
    assert {"resnet32", "resnet50", "resnet152", "resnext50_32x4d", "resnext101_32x8d"} <= set(BACKBONES)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown backbone 'resnet33'; known: .*resnet32"):
        build_backbone("resnet33")


@pytest.mark.parametrize("name", ["resnet32", "resnet18_slim", "resnet18"])
def test_unknown_weights_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="weights"):
        build_backbone(name, "NO_SUCH_WEIGHTS")
