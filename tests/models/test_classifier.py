from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.nn import functional

from camcal.models.camc import CAMC, TaughtAttention
from camcal.models.classifier import LongTailClassifier, ServedClassifier, can_fold, fold_branches
from camcal.models.normalized import Rescale
from camcal.models.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(fit="crop", resize=32, input_size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
IMAGES = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


Head = Literal["linear", "weight", "cosine", "cosnorm", "causal"]
Camc = Literal["off", "weights", "prototypes", "both", "taught"]
Reslt = Literal["off", "cifar", "large", "large-official"]


def _network(camc: Camc = "prototypes", head: Head = "cosine", reslt: Reslt = "off") -> LongTailClassifier:
    """A network with statistics, prototypes and every step of calibration away from where they start."""
    torch.manual_seed(0)
    network = LongTailClassifier(7, PREPROCESSING, backbone="resnet8", camc=camc, head=head, reslt=reslt)
    with torch.no_grad():
        network(IMAGES, torch.tensor([0, 3, 6]))
        if isinstance(network.camc, TaughtAttention):
            network.camc.score.normal_()
        network.head.bias.uniform_(-1, 1)
        network.rescale.factor.fill_(1.3)
        network.rescale.scale.uniform_(0.5, 2)
        network.rescale.shift.uniform_(-1, 1)
        network.marc.omega.uniform_(0.5, 2)
        network.marc.beta.uniform_(-1, 1)
        network.temperature.fill_(1.7)
    return network.eval()


def test_images_are_normalised_inside() -> None:
    network = _network("off")
    seen: list[torch.Tensor] = []
    network.trunk.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network.features(IMAGES)
    expected = (IMAGES[2, 5, 6].double() / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.25, 0.3])
    torch.testing.assert_close(seen[0][2, :, 5, 6].double(), expected, rtol=1e-5, atol=1e-6)


def test_labels_move_prototypes_only_while_training() -> None:
    network = _network()
    assert isinstance(network.camc, CAMC)
    before = network.camc.prototypes.clone()
    network(IMAGES, torch.tensor([1, 1, 1]))
    assert torch.equal(network.camc.prototypes, before)
    network.train()(IMAGES, torch.tensor([1, 1, 1]))
    assert not torch.equal(network.camc.prototypes, before)


def test_served_outputs_fit_together() -> None:
    network = _network()
    with torch.no_grad():
        logits, calibrated, probabilities, calibrated_probabilities, top, maps = ServedClassifier(network)(
            IMAGES, torch.tensor(4)
        )
    torch.testing.assert_close(calibrated, network.calibrate(logits))
    torch.testing.assert_close(probabilities, logits.softmax(dim=1))
    torch.testing.assert_close(calibrated_probabilities, (calibrated / 1.7).softmax(dim=1))
    assert torch.equal(top, calibrated.argsort(dim=1, descending=True)[:, :4])
    assert maps.shape == (3, 4, 8, 8)
    torch.testing.assert_close(maps.sum(dim=(2, 3)), logits.gather(1, top), rtol=1e-4, atol=1e-5)


def test_camc_changes_the_logits_through_the_map_alone() -> None:
    network = _network()
    plain = network.features(IMAGES)
    features = network._reinforce(plain.unsqueeze(1)).squeeze(1)
    ratio = features / plain.clamp_min(1e-12)
    reweighted = plain > 1e-6
    assert ratio[reweighted].min() >= 1 and ratio[reweighted].max() <= 2
    torch.testing.assert_close(network.rescale(network.head(features.mean(dim=(2, 3)))), network(IMAGES))


@pytest.mark.parametrize("reslt", ["off", "cifar"])
@torch.no_grad()
def test_logits_of_the_reinforced_map_against_numpy(reslt: Reslt) -> None:
    network = _network("prototypes", "cosine", reslt)
    network.rescale.load_state_dict(Rescale(7).state_dict())
    assert isinstance(network.camc, CAMC)
    features = network.features(IMAGES)
    maps = features[:, None] if network.branches is None else network.branches(features)
    maps_BRCU = maps.double().numpy().reshape(3, -1, 64, 64)

    def unit(rows: np.ndarray[Any, np.dtype[np.float64]], axis: int = -1) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=axis, keepdims=True), 1e-12))

    weight_KC, scalar = unit(network.head.weight.double().numpy()), float(network.head.scalar)
    bias_K = network.head.bias.double().numpy()
    prototypes_KC = network.camc.prototypes.double().numpy()
    known_KC = unit(prototypes_KC[[0, 3, 6]])  # the classes that have one
    evidence_KC = np.zeros_like(prototypes_KC)
    evidence_KC[[0, 3, 6]] = unit(known_KC - known_KC.mean(axis=0))

    def logits(maps_RCU: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Of one image, the sum of the branches'."""
        return np.asarray((scalar * (unit(maps_RCU.mean(axis=2)) @ weight_KC.T + bias_K)).sum(axis=0))

    for maps_RCU, found_K in zip(maps_BRCU, network(IMAGES), strict=True):
        p_K = np.exp(logits(maps_RCU) - logits(maps_RCU).max())
        direction_C = unit(p_K / p_K.sum() @ evidence_KC)
        correlation_U = direction_C @ unit(maps_RCU.sum(axis=0), axis=0)
        standard_U = (correlation_U - correlation_U.mean()) / correlation_U.std()
        attention_U = 1 / (1 + np.exp(-float(network.camc.alpha) * standard_U))
        np.testing.assert_allclose(found_K, logits((1 + attention_U) * maps_RCU), rtol=1e-3, atol=1e-3)


def test_camc_is_not_taught_through_what_the_network_expects() -> None:
    network = _network("prototypes").train()
    reinforced = network._reinforce(network.features(IMAGES).unsqueeze(1))
    (slope,) = torch.autograd.grad(reinforced.sum(), [network.head.weight], allow_unused=True)
    assert slope is None


@pytest.mark.parametrize("head", ["linear", "weight", "cosine", "cosnorm", "causal"])
@pytest.mark.parametrize("reslt", ["off", "cifar", "large", "large-official"])
@pytest.mark.parametrize("camc", ["off", "both", "taught"])
@torch.no_grad()
def test_maps_are_an_exact_decomposition_whatever_the_parts(head: Head, reslt: Reslt, camc: Camc) -> None:
    network = _network(camc, head, reslt)
    logits, calibrated, _, _, top, maps = ServedClassifier(network)(IMAGES, torch.tensor(7))
    torch.testing.assert_close(logits, network(IMAGES))
    torch.testing.assert_close(maps.sum(dim=(2, 3)), logits.gather(1, top), rtol=1e-4, atol=1e-4)
    omega, offset = network.marc.omega, network.marc.beta * network.weight_norms()
    expected = omega[top] * maps.sum(dim=(2, 3)) + offset[top]
    torch.testing.assert_close(expected, calibrated.gather(1, top), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("head", "reslt", "camc"), [("cosine", "off", "off"), ("causal", "large-official", "taught")])
@torch.no_grad()
def test_both_views_of_an_image_are_averaged(head: Head, reslt: Reslt, camc: Camc) -> None:
    network = _network(camc, head, reslt)
    every = torch.tensor(7)
    plain, mirrored = (ServedClassifier(network)(images, every) for images in (IMAGES, IMAGES.flip(2)))
    network.views = "flip"
    logits, calibrated, probabilities, calibrated_probabilities, top, maps = ServedClassifier(network)(IMAGES, every)
    torch.testing.assert_close(logits, (plain[0] + mirrored[0]) / 2)
    torch.testing.assert_close(logits, network(IMAGES))
    torch.testing.assert_close(calibrated, network.calibrate(logits))
    torch.testing.assert_close(calibrated_probabilities, (calibrated / network.temperature).softmax(dim=1))
    torch.testing.assert_close(maps.sum(dim=(2, 3)), logits.gather(1, top), rtol=1e-4, atol=1e-4)

    def of_class(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return outputs[5][torch.arange(3)[:, None], outputs[4].argsort(dim=1)]

    own, others = of_class((logits, calibrated, probabilities, probabilities, top, maps)), of_class(mirrored).flip(3)
    torch.testing.assert_close(own, (of_class(plain) + others) / 2, rtol=1e-4, atol=1e-5)
    again = ServedClassifier(network)(IMAGES.flip(2), every)
    torch.testing.assert_close(of_class(again), own.flip(3), rtol=1e-4, atol=1e-5)


def test_both_views_are_for_evaluation_only() -> None:
    network = _network("off").train()
    before = network(IMAGES)
    network.views = "flip"
    torch.testing.assert_close(network(IMAGES), before)


@pytest.mark.parametrize("reslt", ["cifar", "large", "large-official"])
def test_branches_are_apart_while_training_and_one_sum_afterwards(reslt: Reslt) -> None:
    network = _network("off", "linear", reslt)
    network.rescale.load_state_dict(LongTailClassifier(7, PREPROCESSING, backbone="resnet8").rescale.state_dict())
    assert network.branches is not None
    maps = network.branches(network.features(IMAGES))
    expected = sum(
        functional.linear(maps[:, b].mean(dim=(2, 3)), network.head.weight, network.head.bias) for b in range(3)
    )
    torch.testing.assert_close(network(IMAGES), expected)
    assert network.train()(IMAGES).shape == (3, 3, 7)


@pytest.mark.parametrize("head", ["linear", "weight"])
@torch.no_grad()
def test_the_folded_network_equals_the_sum_of_branches(head: Head) -> None:
    network = _network("off", head, "cifar")
    folded = fold_branches(network)
    assert folded.branches is None and network.branches is not None and not folded.head.has_gain
    for ours, theirs in zip(
        ServedClassifier(network)(IMAGES, torch.tensor(7)),
        ServedClassifier(folded)(IMAGES, torch.tensor(7)),
        strict=True,
    ):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert folded.scalar == pytest.approx(network.scalar)


@pytest.mark.parametrize(("camc", "head", "reslt"), [("off", "linear", "off"), ("off", "linear", "large")])
def test_what_does_not_fold_says_so(camc: Camc, head: Head, reslt: Reslt) -> None:
    with pytest.raises(ValueError, match="only ResLT's cifar form folds"):
        fold_branches(_network(camc, head, reslt))
    assert not can_fold(_network("both", "linear", "cifar"))
    assert not can_fold(_network("off", "cosine", "cifar"))


@torch.no_grad()
def test_calibration_folds_into_the_rows_of_a_linear_network() -> None:
    network = _network("off", "linear")
    pooled = network.features(IMAGES).mean(dim=(2, 3))
    weight, bias = network.marc.fold(*network.rows())
    torch.testing.assert_close(functional.linear(pooled, weight, bias), network.calibrate(network(IMAGES)))


def test_rescaling_does_not_move_what_camc_attends_to() -> None:
    network = _network("both")
    before = network._reinforce(network.features(IMAGES).unsqueeze(1))
    network.rescale.factor.fill_(40.0)
    assert torch.equal(network._reinforce(network.features(IMAGES).unsqueeze(1)), before)


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two classes, got 1"):
        LongTailClassifier(1, PREPROCESSING)
