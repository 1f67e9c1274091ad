from typing import Literal

import numpy as np
import pytest
import torch
from torch.nn import functional

from camcal.models.camc import CAMC, Attention, Evidence, TaughtAttention, centred_rows


def _inputs(classes: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(3, 8, 5, 6, generator=generator)
    expected = torch.randn(3, classes, generator=generator).softmax(dim=1)
    return features, expected, torch.randn(classes, 8, generator=generator)


def _unit(rows: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


@pytest.mark.parametrize("evidence", ["weights", "prototypes", "both"])
@pytest.mark.parametrize("attention", ["sigmoid", "softmax"])
@pytest.mark.parametrize("top", [0, 1, 2])
def test_attention_against_numpy(evidence: Evidence, attention: Attention, top: int) -> None:
    features, expected, weight = _inputs()
    module = CAMC(8, 4, evidence, attention, top)
    module.prototypes.copy_(torch.rand(4, 8, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        module.alpha.fill_(1.5)
    found = module.attention(features, expected, weight).detach().numpy()

    def contrasted(rows: torch.Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        unit = _unit(rows.double().numpy())
        return _unit(unit - unit.mean(axis=0))

    by_name = {"weights": contrasted(weight), "prototypes": contrasted(module.prototypes)}
    by_name["both"] = _unit(by_name["weights"] + by_name["prototypes"])
    for b in range(3):
        p = expected[b].double().numpy()
        if top:
            p = np.where(p >= np.sort(p)[-top], p, 0)
        direction = p @ by_name[evidence]
        direction /= np.linalg.norm(direction)
        f = features[b].double().numpy().reshape(8, 30)
        r = direction @ (f / np.linalg.norm(f, axis=0))
        z = 1.5 * (r - r.mean()) / r.std()
        a = 1 / (1 + np.exp(-z)) if attention == "sigmoid" else np.exp(z) / np.exp(z).max()
        np.testing.assert_allclose(found[b].reshape(30), a, rtol=1e-3, atol=1e-5)


def test_centred_rows_lose_what_all_classes_share() -> None:
    rows = torch.tensor([[1.0, 0.0, 5.0], [0.0, 1.0, 5.0], [0.0, 0.0, 0.0]])
    found = centred_rows(rows)
    half = 0.5**0.5
    torch.testing.assert_close(found, torch.tensor([[half, -half, 0.0], [-half, half, 0.0], [0.0, 0.0, 0.0]]))


def test_a_single_known_class_has_nothing_to_be_told_from() -> None:
    assert centred_rows(torch.tensor([[0.6, 0.8], [0.0, 0.0]])).abs().max() == 0


@pytest.mark.parametrize("attention", ["sigmoid", "softmax"])
def test_attention_is_highest_where_the_expected_class_is(attention: Attention) -> None:
    module = CAMC(2, 2, "weights", attention)
    features = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1).repeat(1, 1, 3, 3)
    features[0, :, 1, 2] = torch.tensor([0.0, 1.0])
    found = module.attention(features, torch.tensor([[0.0, 1.0]]), torch.eye(2))
    assert found.argmax() == 5 and found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize(("attention", "level"), [("sigmoid", 0.5), ("softmax", 1.0)])
def test_empty_prototypes_give_even_attention_and_finite_gradients(
    attention: Literal["sigmoid", "softmax"], level: float
) -> None:
    module = CAMC(8, 4, "prototypes", attention)
    features, expected, weight = _inputs()
    features.requires_grad_()
    found = module.attention(features, expected, weight)
    torch.testing.assert_close(found, torch.full_like(found, level))
    found.square().sum().backward()
    assert features.grad is not None and torch.isfinite(features.grad).all()


def test_prototypes_start_as_the_mean_region_and_move_by_momentum() -> None:
    module = CAMC(2, 3, "prototypes", momentum=0.75)
    weight, label = torch.eye(3, 2), torch.tensor([1])
    right = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1).repeat(1, 1, 1, 2)
    module.update(9 * right, label, weight)
    assert module.prototypes.tolist() == [[0, 0], [1, 0], [0, 0]]
    module.update(right.flip(1), label, weight)
    assert module.prototypes.tolist() == [[0, 0], [0.75, 0.25], [0, 0]]


def test_prototypes_gather_the_regions_of_the_true_class() -> None:
    module = CAMC(2, 2, "both", momentum=0.0)
    features = torch.zeros(1, 2, 1, 2)
    features[0, 0, 0, 0] = features[0, 1, 0, 1] = 1.0
    module.update(features, torch.tensor([1]), torch.eye(2))
    # Both places are alike but for the class they agree with: sigmoid(1) of the one, sigmoid(-1) of the other.
    strong, weak = 1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))
    length = float(np.hypot(strong, weak))
    expected = torch.tensor([weak / length, strong / length], dtype=torch.float32)
    torch.testing.assert_close(module.prototypes[1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sigmoid", "softmax"])
def test_a_prototype_takes_in_all_images_of_its_class_in_a_batch(attention: Attention) -> None:
    module = CAMC(8, 4, "weights", attention, momentum=0.75)
    module.prototypes.copy_(torch.rand(4, 8, generator=torch.Generator().manual_seed(1)))
    before = module.prototypes.double().numpy().copy()
    features, _, weight = _inputs()
    labels = torch.tensor([2, 0, 2])
    certain = torch.nn.functional.one_hot(labels, 4).float()
    attention_BU = module.attention(features, certain, weight).detach().double().numpy().reshape(3, 30)
    module.update(features, labels, weight)
    f = features.double().numpy().reshape(3, 8, 30)
    attended = _unit(np.einsum("bcu,bu->bc", f, attention_BU / attention_BU.sum(axis=1, keepdims=True)))
    expected = before.copy()
    expected[0] = 0.75 * before[0] + 0.25 * attended[1]
    together = attended[0] + attended[2]
    expected[2] = 0.75 * before[2] + 0.25 * together / np.linalg.norm(together)
    np.testing.assert_allclose(module.prototypes.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_arguments_outside_their_range_are_refused() -> None:
    with pytest.raises(ValueError, match="momentum must be in"):
        CAMC(8, 4, momentum=1.0)
    with pytest.raises(ValueError, match="camc_top must be in 0..4, the number of classes, got 5"):
        CAMC(8, 4, top=5)


def _taught(width: int = 6, classes: int = 4) -> TaughtAttention:
    torch.manual_seed(0)
    attention = TaughtAttention(width, classes, hidden=5)
    attention.follow(torch.randn(classes, width))
    return attention


def test_taught_attention_starts_as_the_average_and_always_sums_to_one() -> None:
    attention, features = _taught(), torch.randn(2, 6, 3, 4)
    torch.testing.assert_close(attention.log_attention(features).exp(), torch.full((2, 3, 4), 1 / 12))
    with torch.no_grad():
        attention.score.normal_()
        found = attention.log_attention(features).exp()
    torch.testing.assert_close(found.sum(dim=(1, 2)), torch.ones(2))
    assert found.std() > 0.01
    torch.testing.assert_close(attention.log_attention(3 * features).exp(), found)  # directions alone count


def test_the_lesson_is_the_divergence_from_the_true_class_s_map() -> None:
    attention, features, labels = _taught(), torch.randn(3, 6, 2, 3), torch.tensor([1, 0, 3])
    with torch.no_grad():
        attention.score.normal_()
    log_attention = attention.log_attention(features)
    attention.teach(features, log_attention, labels)
    expected = 0.0
    for image, log_a, label in zip(features.double(), log_attention.detach().double(), labels, strict=True):
        cosine = functional.cosine_similarity(image.flatten(1), attention.rows[label].double()[:, None], dim=0)
        standard = (cosine - cosine.mean()) / cosine.std(correction=0)
        target = (1.5 * standard).softmax(dim=0)
        expected += float((target * (target.log() - log_a.flatten())).sum()) / 3
    assert attention.lesson.item() == pytest.approx(expected, rel=1e-4)
    attention.lesson.backward()
    assert attention.score.grad is not None and attention.score.grad.abs().sum() > 0


def test_learning_the_lesson_brings_attention_to_where_the_class_is() -> None:
    attention, labels = _taught(), torch.arange(4)
    features = 0.1 * torch.randn(4, 6, 3, 3)
    features[:, :, 1, 2] += 5 * attention.rows
    optimizer = torch.optim.SGD(attention.parameters(), lr=0.5)
    for _ in range(100):
        attention.teach(features, attention.log_attention(features), labels)
        optimizer.zero_grad()
        attention.lesson.backward()
        optimizer.step()
    assert attention.log_attention(features).exp()[:, 1, 2].min() > 0.5


def test_backgrounds_are_exchanged_only_where_both_images_have_one() -> None:
    attention, labels = _taught(), torch.tensor([2, 2])
    features = torch.randn(2, 6, 4, 5)
    mixed = attention.exchange(features, labels)
    relevance = attention.relevance(features, labels).flatten(1)
    low = (relevance <= relevance.quantile(0.4, dim=1, keepdim=True)).all(dim=0).reshape(4, 5)
    changed = (mixed != features).any(dim=1)
    assert low.sum() >= 2 and changed.any() and not (changed & ~low).any()
    for i in (0, 1):
        assert torch.equal(mixed[i][:, changed[i]], features[1 - i][:, changed[i]])
    assert not (changed[0] & changed[1]).any()  # every second position, the others in the other image


def test_rows_follow_the_classifier_slowly() -> None:
    attention = TaughtAttention(2, 2, momentum=0.75)
    attention.follow(torch.tensor([[3.0, 0.0], [0.0, 2.0]]))
    torch.testing.assert_close(attention.rows, torch.eye(2))
    attention.follow(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    torch.testing.assert_close(attention.rows, torch.tensor([[0.75, 0.25], [0.0, 1.0]]))
