import torch
from torch.nn import functional

from camcal.models.marc import MARC


def test_it_starts_as_the_identity() -> None:
    logits = torch.randn(4, 3)
    assert torch.equal(MARC(3)(logits, torch.rand(3)), logits)


def test_formula_by_hand() -> None:
    marc = MARC(2)
    with torch.no_grad():
        marc.omega.copy_(torch.tensor([2.0, 0.5]))
        marc.beta.copy_(torch.tensor([-1.0, 3.0]))
        assert marc(torch.tensor([[10.0, 4.0]]), torch.tensor([5.0, 2.0])).tolist() == [[15.0, 8.0]]


def test_the_folded_layer_equals_layer_and_calibration() -> None:
    torch.manual_seed(0)
    marc, weight, bias, features = MARC(6), torch.randn(6, 9), torch.randn(6), torch.randn(20, 9)
    with torch.no_grad():
        marc.omega.uniform_(0.2, 2)
        marc.beta.uniform_(-1, 1)
        expected = marc(functional.linear(features, weight, bias), weight.norm(dim=1))
        torch.testing.assert_close(functional.linear(features, *marc.fold(weight, bias)), expected)
