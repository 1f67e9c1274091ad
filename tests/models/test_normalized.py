import math

import numpy as np
import pytest
import torch

from camcal.models.normalized import (
    HEADS,
    CausalNormHead,
    CosineHead,
    CosNormHead,
    LinearHead,
    Rescale,
    WeightNormHead,
    build_head,
    tau_norm,
)


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


@pytest.mark.parametrize("head", [build_head(name, 6, 4, 3.0, True) for name in HEADS], ids=HEADS)
def test_weight_norms_are_those_of_the_effective_weights(head: LinearHead) -> None:
    expected = [math.sqrt(sum(x * x for x in row)) for row in head.effective_weight().tolist()]
    torch.testing.assert_close(head.weight_norms(), torch.tensor(expected))


@pytest.mark.parametrize("name", HEADS)
def test_a_zero_feature_gives_finite_logits_and_gradients(name: str) -> None:
    head, pooled = build_head(name, 4, 3, 16.0, True), torch.zeros(1, 4, requires_grad=True)
    logits = head(pooled)
    logits.square().sum().backward()
    assert torch.isfinite(logits).all()
    assert pooled.grad is not None and torch.isfinite(pooled.grad).all()


def test_a_scalar_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="scalar must be positive, got 0"):
        CosineHead(4, 3, scalar=0)


def test_weight_norm_head_by_hand() -> None:
    head = WeightNormHead(2, 2, scalar=2.0)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0, 9.0], [3.0, 4.0]]))
    torch.testing.assert_close(head(torch.tensor([[5.0, 10.0]])), torch.tensor([[20.0, 2 * (15 + 40) / 5]]))


def test_cosnorm_head_against_numpy() -> None:
    torch.manual_seed(0)
    head, pooled = CosNormHead(6, 5), torch.randn(4, 6)
    w, g = head.weight.detach().double().numpy(), pooled.double().numpy()
    norm = np.linalg.norm(g, axis=1, keepdims=True)
    expected = 16 * (norm / (1 + norm) * g / norm) @ (w / np.linalg.norm(w, axis=1, keepdims=True)).T
    np.testing.assert_allclose(head(pooled).detach().numpy(), expected, rtol=1e-5, atol=1e-5)


def test_causal_norm_head_against_numpy() -> None:
    torch.manual_seed(0)
    head, pooled = CausalNormHead(6, 5), torch.randn(4, 6)
    w, g = head.weight.detach().double().numpy(), pooled.double().numpy()
    expected = np.zeros((4, 5))
    for part in (slice(0, 3), slice(3, 6)):
        unit_w = w[:, part] / (np.linalg.norm(w[:, part], axis=1, keepdims=True) + 1 / 32)
        expected += 16 / 2 * g[:, part] / np.linalg.norm(g[:, part], axis=1, keepdims=True) @ unit_w.T
    np.testing.assert_allclose(head(pooled).detach().numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_every_head_is_linear_once_its_gain_is_known(name: str) -> None:
    torch.manual_seed(0)
    head, pooled = build_head(name, 8, 5, 7.0, True), torch.randn(2, 3, 8)
    expected = (head.gain(pooled) * pooled) @ head.effective_weight().T + head.effective_bias()
    torch.testing.assert_close(head(pooled), expected)
    assert head.has_gain == (not torch.equal(head.gain(pooled), torch.ones(2, 3, 1)))


def test_unknown_heads_and_channels_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown head 'cosinus'; known: linear, weight, cosine, cosnorm, causal"):
        build_head("cosinus", 4, 3, 16.0, True)
    with pytest.raises(ValueError, match="5 channels cannot be divided into 2 heads"):
        CausalNormHead(5, 3)


def test_rescaling_by_hand_and_undone() -> None:
    rescale = Rescale(2)
    trained = torch.tensor([[1.0, -2.0]])
    assert torch.equal(rescale(trained), trained)
    rescale.factor.fill_(2.0)
    rescale.scale.copy_(torch.tensor([3.0, 0.5]))
    rescale.shift.copy_(torch.tensor([-1.0, 4.0]))
    assert rescale(trained).tolist() == [[5.0, 2.0]]
    assert rescale.undo(rescale(trained)).tolist() == trained.tolist()


def test_tau_norm_is_the_layer_with_shortened_weights_and_no_bias() -> None:
    torch.manual_seed(0)
    head, pooled = LinearHead(6, 4), torch.randn(5, 6)
    with torch.no_grad():
        head.bias.uniform_(-1, 1)
        scale, shift = tau_norm(head.weight, head.bias, 0.7)
        w = head.weight.double().numpy()
        expected = pooled.double().numpy() @ (w / np.linalg.norm(w, axis=1, keepdims=True) ** 0.7).T
        np.testing.assert_allclose((scale * head(pooled) + shift).numpy(), expected, rtol=1e-5, atol=1e-5)
