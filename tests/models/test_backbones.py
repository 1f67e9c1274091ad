from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn
from torchvision.models import ResNet18_Weights, resnet50

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


def _noisy(trunk: nn.Module) -> nn.Module:
    """The trunk in evaluation mode, with batch statistics as if it had been trained."""
    generator = torch.Generator().manual_seed(0)
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return trunk.eval()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "timm/resnet18", "timm/resnet50"])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_a_finer_map_is_the_usual_one_with_positions_between(name: str, output_stride: Literal[8, 16]) -> None:
    torch.manual_seed(0)
    usual, width = build_backbone(name)
    fine, same = build_backbone(name, output_stride=output_stride)
    fine.load_state_dict(_noisy(usual).state_dict())
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    step = 32 // output_stride
    with torch.inference_mode():
        usual_BChw, fine_BChw = usual(images), fine.eval()(images)
    assert same == width and fine_BChw.shape == (2, width, 2 * step, 2 * step)
    same_BChw, between_BChw = fine_BChw[:, :, ::step, ::step], fine_BChw[:, :, 1::step, ::step]
    assert (same_BChw - usual_BChw).norm() < 1e-4 * usual_BChw.norm()
    assert (between_BChw - usual_BChw).norm() > 0.01 * usual_BChw.norm()


def test_torchvision_s_own_dilation_gives_the_same_map() -> None:
    fine, _ = build_backbone("resnet50", output_stride=8)
    theirs = resnet50(replace_stride_with_dilation=[False, True, True])
    same = nn.Sequential(*list(theirs.children())[:-2])
    same.load_state_dict(_noisy(fine).state_dict())
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(same.eval()(images), fine(images))


@pytest.mark.parametrize(("name", "grid"), [("tf_efficientnet_lite0", 14), ("test_convnext", 14), ("regnetx_002", 14)])
def test_other_networks_of_timm_give_finer_maps_too(name: str, grid: int) -> None:
    trunk, width = build_backbone(f"timm/{name}", output_stride=16)
    with torch.inference_mode():
        assert trunk.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, width, grid, grid)


@pytest.mark.parametrize("name", ["resnet32", "resnet18_slim", "timm/test_vit", "timm/swin_tiny_patch4_window7_224"])
def test_a_network_without_an_output_stride_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has no output_stride: that is for torchvision's networks, and for"):
        build_backbone(name, output_stride=16)


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
