"""Each operation against torchvision's, on photograph-like, flat and noisy images."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional as reference

from camcal.training.data import operations
from camcal.training.data.operations import NAMES, POINTWISE, apply, matrices, warp


def _images(count: int, size: int = 32) -> Tensor:
    """Noise, a smooth gradient, few grey levels, one grey level, and black beside white; uint8 count×3×size×size."""
    generator = torch.Generator().manual_seed(size)
    noise = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    ramp = torch.linspace(20, 200, size).to(torch.uint8)
    noise[1::5] = (ramp[:, None] // 2 + ramp // 2).expand_as(noise[1::5])
    noise[2::5] = noise[2::5] // 100 * 90
    noise[3::5] = 77
    noise[4::5, :, : size // 2], noise[4::5, :, size // 2 :] = 0, 255
    return noise


def _difference(ours: Tensor, theirs: Tensor) -> int:
    assert ours.dtype == theirs.dtype == torch.uint8 and ours.shape == theirs.shape
    return int((ours.int() - theirs.int()).abs().max())


def _expected(name: str, image: Tensor, m: float) -> Tensor:
    grey = [128.0] * 3
    degrees = math.degrees(math.atan(m))
    still, centre = [0, 0], [0, 0]
    results: dict[str, Callable[[], Tensor]] = {
        "shear_x": lambda: reference.affine(image, 0.0, still, 1.0, [degrees, 0.0], fill=grey, center=centre),
        "shear_y": lambda: reference.affine(image, 0.0, still, 1.0, [0.0, degrees], fill=grey, center=centre),
        "translate_x": lambda: reference.affine(image, 0.0, [int(m), 0], 1.0, [0.0, 0.0], fill=grey),
        "translate_y": lambda: reference.affine(image, 0.0, [0, int(m)], 1.0, [0.0, 0.0], fill=grey),
        "rotate": lambda: reference.rotate(image, m, fill=grey),
        "brightness": lambda: reference.adjust_brightness(image, 1 + m),
        "colour": lambda: reference.adjust_saturation(image, 1 + m),
        "contrast": lambda: reference.adjust_contrast(image, 1 + m),
        "sharpness": lambda: reference.adjust_sharpness(image, 1 + m),
        "posterize": lambda: reference.posterize(image, int(m)),
        "solarize": lambda: reference.solarize(image, m),
        "autocontrast": lambda: reference.autocontrast(image),
        "equalize": lambda: reference.equalize(image),
        "invert": lambda: reference.invert(image),
        "identity": lambda: image,
    }
    return results[name]()


MAGNITUDES = {
    "shear_x": [-0.99, -0.3, 0.0, 0.17, 0.99],
    "shear_y": [-0.99, -0.3, 0.0, 0.17, 0.99],
    "translate_x": [-31.7, -3.0, 0.0, 0.9, 14.5],
    "translate_y": [-31.7, -3.0, 0.0, 0.9, 14.5],
    "rotate": [-135.0, -30.0, 0.0, 6.7, 90.0],
    "posterize": [2.0, 4.0, 5.0, 7.0, 8.0],
    "solarize": [0.0, 28.3, 128.0, 254.9, 255.0],
}
ENHANCE = [-0.99, -0.5, 0.0, 0.3, 0.9]


@pytest.mark.parametrize("size", [32, 17])
@pytest.mark.parametrize("name", NAMES)
def test_each_operation_is_that_of_torchvision(name: str, size: int) -> None:
    images = _images(25, size)
    magnitudes = torch.tensor([m for m in MAGNITUDES.get(name, ENHANCE) for _ in range(5)])
    ours = apply(images, torch.full((25,), NAMES.index(name)), magnitudes)
    for image, m, out in zip(images, magnitudes.tolist(), ours, strict=True):
        expected = _expected(name, image, m)
        if name not in operations.GEOMETRIC:
            assert _difference(out, expected) <= (1 if name in ("contrast", "sharpness", "colour", "brightness") else 0)
        else:
            # Both take the nearest pixel; one that lies half way between two may be rounded the other way.
            assert (out != expected).any(dim=0).float().mean() <= 0.01


def test_a_batch_of_mixed_operations_gives_each_image_its_own() -> None:
    images = _images(60)
    kinds = torch.arange(60) % len(NAMES)
    magnitudes = torch.tensor([MAGNITUDES.get(NAMES[k], ENHANCE)[3] for k in kinds.tolist()])
    mixed = apply(images, kinds, magnitudes)
    for i in range(60):
        assert torch.equal(mixed[i], apply(images[i : i + 1], kinds[i : i + 1], magnitudes[i : i + 1])[0])


def test_a_warp_shows_grey_outside_and_keeps_black_inside() -> None:
    black = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    out = warp(black, matrices(torch.tensor([2]), torch.tensor([3.0]), 8))
    assert (out[..., :3] == operations.FILL).all() and (out[..., 3:] == 0).all()


def test_sharpness_leaves_images_without_an_inside() -> None:
    image = torch.randint(0, 256, (1, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(operations.sharpness(image, torch.tensor([0.9])), image)


def test_every_name_has_its_operation() -> None:
    assert len(NAMES) == len(set(NAMES)) == len(operations.GEOMETRIC) + len(POINTWISE) == 15
