import numpy as np
import pytest
import torch

from models.camc import CAMC, Evidence


def _inputs(classes: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(3, 8, 5, 6, generator=generator)
    expected = torch.randn(3, classes, generator=generator).softmax(dim=1)
    return features, expected, torch.randn(classes, 8, generator=generator)


@pytest.mark.parametrize("evidence", ["weights", "prototypes"])
def test_attention_against_numpy(evidence: Evidence) -> None:
    features, expected, weight = _inputs()
    module = CAMC(8, 4, evidence)
    module.prototypes.copy_(torch.rand(4, 8, generator=torch.Generator().manual_seed(1)))
    found = module.attention(features, expected, weight).detach().numpy()

    source = (module.prototypes if evidence == "prototypes" else weight).double().numpy()
    unit = source / np.linalg.norm(source, axis=1, keepdims=True)
    for b in range(3):
        direction = expected[b].double().numpy() @ unit
        direction /= np.linalg.norm(direction)
        f = features[b].double().numpy().reshape(8, 30)
        r = direction @ (f / np.linalg.norm(f, axis=0))
        z = (r - r.mean()) / r.std()
        np.testing.assert_allclose(found[b].reshape(30), 1 / (1 + np.exp(-z)), rtol=1e-3)


def test_attention_is_highest_where_the_expected_class_is() -> None:
    module = CAMC(2, 2, "weights")
    features = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1).repeat(1, 1, 3, 3)
    features[0, :, 1, 2] = torch.tensor([0.0, 1.0])
    attention = module.attention(features, torch.tensor([[0.0, 1.0]]), torch.eye(2))
    assert attention.argmax() == 5


def test_empty_prototypes_give_even_attention_and_finite_gradients() -> None:
    module = CAMC(8, 4, "prototypes")
    features, expected, weight = _inputs()
    features.requires_grad_()
    attention = module.attention(features, expected, weight)
    torch.testing.assert_close(attention, torch.full_like(attention, 0.5))
    attention.square().sum().backward()
    assert features.grad is not None and torch.isfinite(features.grad).all()


def test_prototypes_are_a_moving_average_of_attended_unit_features() -> None:
    module = CAMC(2, 3, "prototypes", momentum=0.75)
    features = torch.zeros(1, 2, 1, 2)
    features[0, :, 0, 0] = torch.tensor([2.0, 0.0])
    features[0, :, 0, 1] = torch.tensor([0.0, 9.0])
    left, right = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    label = torch.tensor([1])
    module.update(features, left, label)
    assert module.prototypes.tolist() == [[0, 0], [1, 0], [0, 0]]
    module.update(features, right, label)
    assert module.prototypes.tolist() == [[0, 0], [0.75, 0.25], [0, 0]]


def test_a_momentum_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match="momentum must be in"):
        CAMC(8, 4, momentum=1.0)
