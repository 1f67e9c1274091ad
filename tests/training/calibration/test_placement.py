from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from camcal.models.bundle import Bundle
from camcal.models.classifier import LongTailClassifier
from camcal.models.enlargement import enlargement
from camcal.models.preprocessing import Preprocessing
from camcal.training.calibration.placement import map_shift, measure_shift
from camcal.training.checkpoints import load_network
from camcal.training.data import LabelledImages
from camcal.training.run import RunFolder

Floats = np.ndarray[Any, np.dtype[np.float32]]


def _blobs(centres: Floats, shift: float, count: int = 8) -> Floats:
    """One smooth blob a map, `shift` positions to the right of where it should be."""
    at = np.arange(count)
    columns = np.exp(-((at - centres[:, None] - shift) ** 2) / 4)
    rows = np.exp(-((at - 3) ** 2) / 4)
    return (rows[None, :, None] * columns[:, None]).astype(np.float32)


@pytest.mark.parametrize("shift", [-0.4, 0.0, 0.27, 0.5])
def test_the_shift_of_maps_is_found(shift: float) -> None:
    centres = np.random.default_rng(0).uniform(2, 5, 20).astype(np.float32)
    found = map_shift(_blobs(centres, shift), _blobs(7 - centres, shift))
    assert found == pytest.approx(shift, abs=0.02)


def test_a_map_moved_back_lies_where_it_should() -> None:
    centres = np.array([2.5, 4.0], dtype=np.float32)
    moved = _blobs(centres, 0.3) @ enlargement(8, 64, 0.3).T
    even = _blobs(centres, 0.0) @ enlargement(8, 64).T
    np.testing.assert_allclose(moved[:, :, 12:52], even[:, :, 12:52], atol=0.03)  # no map knows what lies beyond it


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 4, 1), (3, 2, 2), (3, 7, 7)])
def test_maps_whose_columns_are_alike_have_no_shift(shape: tuple[int, int, int]) -> None:
    flat = np.zeros(shape, dtype=np.float32)
    flat += np.arange(3)[:, None, None] / 3
    assert map_shift(flat, flat) == 0


class _EveryFourth(torch.nn.Module):
    """A trunk whose map is every fourth pixel, in both directions, from `first` on."""

    def __init__(self, first: int, width: int) -> None:
        super().__init__()
        self.first, self.width = first, width

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        grey_B1hw = images_BCHW.mean(dim=1, keepdim=True)[:, :, self.first :: 4, self.first :: 4]
        return (grey_B1hw - grey_B1hw.amin()).expand(-1, self.width, -1, -1)


@pytest.mark.parametrize(("first", "shift"), [(0, 0.375), (1, 0.125), (3, -0.375)])
def test_a_network_is_measured_by_what_it_makes_of_mirrored_images(first: int, shift: float) -> None:
    rule = Preprocessing(fit="stretch", resize=32, input_size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    network = LongTailClassifier(3, rule, backbone="resnet8", head="linear").eval()
    network.trunk = _EveryFourth(first, network.head.weight.shape[1])
    generator = np.random.default_rng(0)
    centre_N2, at = generator.uniform(8, 24, (40, 2)), np.arange(32)
    rows, columns = (np.exp(-((at - centre_N2[:, axis, None]) ** 2) / 30) for axis in (0, 1))
    images = (255 * rows[:, :, None] * columns[:, None])[..., None].repeat(3, axis=3).astype(np.uint8)
    blobs = LabelledImages(images=torch.from_numpy(images), labels=torch.zeros(40, dtype=torch.int64))
    assert measure_shift(network, blobs, seed=0) == pytest.approx(shift, abs=0.02)


def test_calibration_measures_the_shift_and_the_bundle_carries_it(digits_run: RunFolder, digits_bundle: Path) -> None:
    network, _, meta = load_network(digits_run.network)
    assert -1 < network.map_shift.item() < 1
    shift = Bundle.load(digits_bundle).manifest.map_shift
    assert shift == pytest.approx(network.map_shift.item()) == pytest.approx(meta["calibration"]["map_shift"])
