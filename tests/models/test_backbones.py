from pathlib import Path

import pytest
import torch
from torchvision.models import ResNet18_Weights

from camcal.models.backbones import build_backbone


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("resnet8", 32, 8),
        ("resnet32", 32, 8),
        ("resnet18_slim", 112, 7),
        ("resnet18", 64, 2),
        ("resnet50", 64, 2),
        ("resnet152", 64, 2),
        ("resnext50_32x4d", 64, 2),
        ("resnext101_32x8d", 64, 2),
    ],
)
def test_a_trunk_returns_a_map_of_the_width_it_names(name: str, size: int, grid: int) -> None:
    trunk, width = build_backbone(name)
    with torch.inference_mode():
        assert trunk.eval()(torch.zeros(1, 3, size, size)).shape == (1, width, grid, grid)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown backbone 'resnet33'; known: .*resnet32"):
        build_backbone("resnet33")


@pytest.mark.parametrize("name", ["resnet32", "resnet18_slim", "resnet18"])
def test_unknown_weights_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="weights"):
        build_backbone(name, "NO_SUCH_WEIGHTS")


@pytest.mark.parametrize("content", [b"junk", b"", b"PK\x03\x04", bytes(1000)])
def test_a_damaged_file_of_weights_is_said_to_be_unreadable(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / Path(ResNet18_Weights.IMAGENET1K_V1.url).name).write_bytes(content)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        ValueError, match="'IMAGENET1K_V1' of resnet18 cannot be fetched into .*checkpoints or read from there"
    ):
        build_backbone("resnet18", "IMAGENET1K_V1")
