from typing import Literal

import pytest
import torch

from models.classifier import LongTailClassifier, ServedClassifier
from models.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(fit="crop", resize=32, input_size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
IMAGES = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _network(camc: Literal["off", "weights", "prototypes"] = "prototypes") -> LongTailClassifier:
    torch.manual_seed(0)
    network = LongTailClassifier(7, PREPROCESSING, backbone="resnet8", camc=camc)
    with torch.no_grad():
        network(IMAGES, torch.tensor([0, 3, 6]))
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
    assert network.camc is not None
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
    logits, features, gain = network.explain(IMAGES)
    plain = network.features(IMAGES)
    ratio = features / plain.clamp_min(1e-12)
    reweighted = plain > 1e-6
    assert ratio[reweighted].min() >= 1 and ratio[reweighted].max() <= 2
    torch.testing.assert_close(network.head(features.mean(dim=(2, 3))), logits)
    assert gain.shape == (3, 1)


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two classes, got 1"):
        LongTailClassifier(1, PREPROCESSING)
