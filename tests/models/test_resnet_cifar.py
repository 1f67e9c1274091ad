import pytest
import torch
from torchvision.models.resnet import BasicBlock

from camcal.models.backbones import build_backbone
from camcal.models.resnet_cifar import CifarBlock, CifarResNet


def test_resnet32_has_the_published_number_of_parameters() -> None:
    trunk = CifarResNet(32)
    classifier_of_ten = 64 * 10 + 10
    # He et al., table 6: 0.46 million.
    assert sum(p.numel() for p in trunk.parameters()) + classifier_of_ten == 464_154


def test_the_wide_one_has_sixteen_times_as_many() -> None:
    trunk, width = build_backbone("resnet32_wide")
    assert width == 256
    stem = 3 * 9 * 64 + 2 * 64
    stages = 5 * (2 * 9 * 64**2 + 4 * 64)
    stages += 9 * 64 * 128 + 9 * 9 * 128**2 + 10 * 2 * 128
    stages += 9 * 128 * 256 + 9 * 9 * 256**2 + 10 * 2 * 256
    parameters = sum(p.numel() for p in trunk.parameters())
    assert parameters == stem + stages and round(parameters / 1e6, 1) == 7.4
    assert trunk(torch.zeros(2, 3, 32, 32)).shape == (2, 256, 8, 8)


def test_the_map_is_a_quarter_of_the_image() -> None:
    assert CifarResNet(8)(torch.zeros(2, 3, 32, 32)).shape == (2, 64, 8, 8)


def test_the_shortcut_subsamples_and_pads_with_zeros() -> None:
    block = CifarBlock(2, 4, stride=2).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    image = torch.rand(1, 2, 4, 4)
    out = block(image)
    assert torch.equal(out[:, 1:3], image[:, :, ::2, ::2])
    assert not out[:, [0, 3]].any()


@pytest.mark.parametrize("depth", [2, 9, 18])
def test_other_depths_are_refused(depth: int) -> None:
    with pytest.raises(ValueError, match="6n\\+2"):
        CifarResNet(depth)


@pytest.mark.parametrize("training", [True, False])
def test_a_block_without_a_change_of_width_is_torchvision_s(training: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = CifarBlock(6, 6, stride=1), BasicBlock(6, 6)
    for module in (ours.bn1, ours.bn2):
        torch.nn.init.normal_(module.weight)
        torch.nn.init.normal_(module.bias)
        module.running_var = torch.rand(6) + 0.5
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(4, 6, 8, 8)
    torch.testing.assert_close(ours.train(training)(images), theirs.train(training)(images))
