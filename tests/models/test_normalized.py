import math

import pytest
import torch

from models.normalized import CosineHead, LinearHead


def test_linear_head_is_a_linear_layer() -> None:
    head = LinearHead(2, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 2.0], [-1.0, 0.5]]))
        head.bias.copy_(torch.tensor([0.25, -0.5]))
    assert head(torch.tensor([[3.0, 4.0]])).tolist() == [[11.25, -1.5]]


def test_cosine_head_by_hand() -> None:
    head = CosineHead(2, 2, scalar=10.0)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[7.0, 0.0], [3.0, 3.0]]))
    cosine = (3 + 4) / (5 * math.sqrt(2))
    torch.testing.assert_close(head(torch.tensor([[3.0, 4.0]])), torch.tensor([[6.0, 10 * cosine]]))


def test_cosine_logits_ignore_the_length_of_features_and_weights() -> None:
    torch.manual_seed(0)
    head, pooled = CosineHead(8, 5), torch.randn(4, 8)
    before = head(pooled)
    with torch.no_grad():
        head.weight.mul_(torch.rand(5, 1) + 0.5)
    torch.testing.assert_close(head(3 * pooled), before)
    assert before.abs().max() <= head.scalar


def test_the_scalar_is_trained_unless_it_is_fixed() -> None:
    learned, fixed = CosineHead(4, 3), CosineHead(4, 3, learn_scalar=False)
    assert "scalar" in dict(learned.named_parameters())
    assert "scalar" not in dict(fixed.named_parameters())
    assert fixed.state_dict()["scalar"] == 16.0


@pytest.mark.parametrize("head", [LinearHead(6, 4), CosineHead(6, 4)])
def test_weight_norms_are_those_of_the_effective_weights(head: LinearHead) -> None:
    expected = [math.sqrt(sum(x * x for x in row)) for row in head.effective_weight().tolist()]
    torch.testing.assert_close(head.weight_norms(), torch.tensor(expected))


def test_a_zero_feature_gives_finite_logits() -> None:
    assert torch.isfinite(CosineHead(4, 3)(torch.zeros(1, 4))).all()


def test_a_scalar_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="scalar must be positive, got 0"):
        CosineHead(4, 3, scalar=0)
