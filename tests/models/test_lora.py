import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from camcal.models.backbones import build_backbone
from camcal.models.lora import add_lora, merge_lora


def _moved(trunk: nn.Module) -> nn.Module:
    """The trunk, in evaluation mode, after its trained parameters have changed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trunk.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return trunk.eval()


@pytest.mark.parametrize("name", ["test_vit", "beit_base_patch16_224", "swin_tiny_patch4_window7_224", "test_convnext"])
@torch.no_grad()
def test_an_adapted_trunk_starts_as_it_was_learns_and_becomes_plain(name: str) -> None:
    torch.manual_seed(0)
    trunk, _ = build_backbone(f"timm/{name}", None, 64)
    for parameter_name, parameter in trunk.named_parameters():
        if parameter_name.endswith("gamma"):  # ConvNeXt's blocks start at a millionth of their output
            parameter.fill_(1)
    images = torch.randn(2, 3, 64, 64)
    names, before = set(trunk.state_dict()), trunk.eval()(images)
    add_lora(trunk, 2)
    torch.testing.assert_close(trunk.eval()(images), before)
    adapted = _moved(trunk)(images)
    assert (adapted - before).norm() > 1e-3 * before.norm()
    merged = copy.deepcopy(trunk)
    merge_lora(merged)
    assert set(merged.state_dict()) == names
    torch.testing.assert_close(merged(images), adapted, rtol=1e-4, atol=1e-5)
    assert not any(parametrize.is_parametrized(module) for module in merged.modules())
    torch.testing.assert_close(trunk(images), adapted)  # the copy alone was changed


def test_only_linear_weights_change_and_only_by_the_rank() -> None:
    trunk, _ = build_backbone("timm/test_vit", None, 64)
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    linear = {f"{name}.weight" for name, module in trunk.named_modules() if isinstance(module, nn.Linear)}
    add_lora(trunk, 2)
    trained = [name for name, parameter in trunk.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(linear) and all(name.endswith((".0.down", ".0.up")) for name in trained)
    merge_lora(_moved(trunk))
    for name, tensor in trunk.state_dict().items():
        if name in linear:
            assert torch.linalg.matrix_rank(tensor - before[name], tol=1e-4) == 2
        else:
            assert torch.equal(tensor, before[name])


def test_the_first_gradient_reaches_b_only_and_the_next_ones_both() -> None:
    trunk, _ = build_backbone("timm/test_vit", None, 64)
    add_lora(trunk, 2)
    layer = trunk.get_submodule("network.blocks.0.attn.qkv.parametrizations.weight.0")
    for expected in (0, 1):
        trunk.zero_grad()
        trunk(torch.randn(2, 3, 64, 64)).square().sum().backward()
        down, up = (getattr(layer, name) for name in ("down", "up"))
        assert up.grad.abs().sum() > 0 and bool(down.grad.abs().sum() > 0) == bool(expected)
        with torch.no_grad():
            up -= 0.01 * up.grad


@pytest.mark.parametrize("name", ["resnet18", "timm/test_efficientnet"])
def test_a_trunk_without_linear_layers_is_refused(name: str) -> None:
    trunk, _ = build_backbone(name, None, 64)
    with pytest.raises(ValueError, match="fit.lora is for trunks with linear layers, such as transformers"):
        add_lora(trunk, 2)
