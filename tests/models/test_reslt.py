import numpy as np
import torch
from torch import nn

from camcal.models.reslt import ConvBranches, NormBranches, build_branches, fold


def _vary(norm: nn.Module) -> None:
    """Statistics and parameters away from where they start."""
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.2, 3)


def _norms(width: int) -> NormBranches:
    """Branches whose statistics and parameters all differ, in evaluation mode."""
    torch.manual_seed(0)
    branches = NormBranches(width)
    for norm in branches.norms:
        _vary(norm)
    return branches.eval()


def test_the_cifar_form_against_numpy() -> None:
    branches, features = _norms(4), torch.randn(2, 4, 3, 5)
    maps = branches(features).detach().numpy()
    assert maps.shape == (2, 3, 4, 3, 5)
    for b, norm in enumerate(branches.norms):
        p = {name: t.detach().double().numpy()[:, None, None] for name, t in norm.state_dict().items() if t.ndim}
        standard = (features.double().numpy() - p["running_mean"]) / np.sqrt(p["running_var"] + 1e-5)
        np.testing.assert_allclose(maps[:, b], p["weight"] * standard + p["bias"], rtol=1e-5, atol=1e-5)


def test_while_training_each_branch_normalises_by_the_batch() -> None:
    maps = NormBranches(4).train()(torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(0)) * 7 + 3)
    torch.testing.assert_close(maps.mean(dim=(0, 3, 4)), torch.zeros(3, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(maps.var(dim=(0, 3, 4), correction=0), torch.ones(3, 4), rtol=1e-3, atol=1e-3)


def test_the_cifar_form_adds_six_parameters_a_channel() -> None:
    assert sum(p.numel() for p in NormBranches(64).parameters()) == 384


def test_the_folded_layer_equals_the_sum_of_branches() -> None:
    branches, features = _norms(6), torch.randn(5, 6, 4, 4)
    linear = nn.Linear(6, 3)
    with torch.no_grad():
        branch_logits = linear(branches(features).mean(dim=(3, 4)))
        weight, bias = fold(branches, linear.weight, linear.bias)
        folded = nn.functional.linear(features.mean(dim=(2, 3)), weight, bias)
    torch.testing.assert_close(folded, branch_logits.sum(dim=1), rtol=1e-5, atol=1e-5)


def test_the_large_form_against_numpy() -> None:
    torch.manual_seed(0)
    branches, features = ConvBranches(3).eval(), torch.randn(2, 3, 4, 4)
    _vary(branches.norm)
    maps = branches(features).detach().numpy()
    kernel = branches.convolution.weight.detach().double().numpy()[:, :, 0, 0]
    mixed = np.einsum("oc,bchw->bohw", kernel, features.double().numpy())
    p = {name: t.detach().double().numpy()[:, None, None] for name, t in branches.norm.state_dict().items() if t.ndim}
    normed = p["weight"] * (mixed - p["running_mean"]) / np.sqrt(p["running_var"] + 1e-5) + p["bias"]
    np.testing.assert_allclose(maps, np.maximum(normed, 0).reshape(2, 3, 3, 4, 4), rtol=1e-5, atol=1e-5)


def test_the_official_form_pools_before_the_relu_in_evaluation_only() -> None:
    torch.manual_seed(0)
    branches, features = ConvBranches(4, pool_first=True).eval(), torch.randn(5, 4, 3, 3)
    _vary(branches.norm)
    pooled = branches.norm(branches.convolution(features.mean(dim=(2, 3), keepdim=True)))
    assert 0 < (pooled < 0).float().mean() < 1
    expected = torch.relu(pooled).reshape(5, 3, 4)
    torch.testing.assert_close(branches(features).mean(dim=(3, 4)), expected, rtol=1e-5, atol=1e-5)
    assert (branches(features) < 0).any()  # positions may count against a class
    plain = ConvBranches(4)
    plain.load_state_dict(branches.state_dict())
    torch.testing.assert_close(branches.train()(features), plain.train()(features))


def test_the_forms_by_name() -> None:
    assert isinstance(build_branches("cifar", 4), NormBranches)
    for form in ("large", "large-official"):
        branches = build_branches(form, 4)
        assert isinstance(branches, ConvBranches) and branches.pool_first == (form == "large-official")
