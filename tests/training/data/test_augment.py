from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from camcal.training.data.augment import Augment
from camcal.training.recipe import AugmentConfig

IMAGES = torch.randint(0, 256, (64, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _apply(images: Tensor = IMAGES, seed: int = 0, **settings: Any) -> Tensor:
    return Augment(AugmentConfig.model_validate(settings), torch.Generator().manual_seed(seed))(images)


def test_the_defaults_change_nothing() -> None:
    assert torch.equal(_apply(), IMAGES.float())


def test_flip_mirrors_about_half() -> None:
    out = _apply(flip=True)
    mirrored = [torch.allclose(a, b.flip(1).float(), atol=1e-3) for a, b in zip(out, IMAGES, strict=True)]
    kept = [torch.allclose(a, b.float(), atol=1e-3) for a, b in zip(out, IMAGES, strict=True)]
    assert all(m or k for m, k in zip(mirrored, kept, strict=True))
    assert 20 <= sum(mirrored) <= 44


def test_shift_moves_by_whole_pixels_and_fills_with_zero() -> None:
    out = _apply(IMAGES[:1].expand(1000, 16, 16, 3), shift=2)
    padded = torch.nn.functional.pad(IMAGES[0].float(), (0, 0, 2, 2, 2, 2))
    windows = torch.stack([padded[y : y + 16, x : x + 16] for y in range(5) for x in range(5)])
    shown = (out[:, None] - windows).abs().amax(dim=(2, 3, 4)) < 1e-2
    assert (shown.sum(dim=1) == 1).all()
    assert shown.sum(dim=0).min() > 20  # of the 40 that each of the 25 has on average


def test_a_crop_shows_a_part_of_the_image() -> None:
    ramp = torch.arange(16.0).mul(15).to(torch.uint8).reshape(1, 1, 16, 1).expand(64, 16, 16, 3)
    out = _apply(ramp, area=[0.25, 0.25], fill="mirror")
    span = out[:, 8, -1, 0] - out[:, 8, 0, 0]
    torch.testing.assert_close(span, torch.full_like(span, 0.5 * 225), rtol=0.1, atol=2)


def _window(**settings: Any) -> tuple[Tensor, Tensor]:
    """What 64 augmented images show of a picture whose red is x and whose green is y, from -1 to 1 over its sides.

    Centre and differences along columns and rows, 64×2 and 64×2×2: by them the affine window is known.
    """
    at = (torch.arange(64.0) + 0.5) / 32 - 1
    x, y = at.expand(64, 64), at[:, None].expand(64, 64)
    picture = torch.stack([127.5 + 64 * x, 127.5 + 64 * y, 0 * x], dim=2).round().to(torch.uint8)
    seen = (_apply(picture.expand(64, 64, 64, 3), fill="mirror", **settings)[..., :2] - 127.5) / 64
    middle = seen[:, 24:40, 24:40]
    across = (middle[:, :, 8:].mean(dim=(1, 2)) - middle[:, :, :8].mean(dim=(1, 2))) * 4
    down = (middle[:, 8:].mean(dim=(1, 2)) - middle[:, :8].mean(dim=(1, 2))) * 4
    return middle.mean(dim=(1, 2)), torch.stack([across, down], dim=2)


def test_a_crop_has_the_area_and_the_aspect_asked_for_and_lies_anywhere() -> None:
    centre, sides = _window(area=[0.2, 0.3], aspect=[1.5, 2.0])
    width, height = sides[:, 0, 0], sides[:, 1, 1]
    area, aspect = width * height, width / height
    assert 0.19 < area.min() < 0.22 and 0.28 < area.max() < 0.31
    assert 1.45 < aspect.min() < 1.6 and 1.9 < aspect.max() < 2.06
    assert sides[:, 0, 1].abs().max() < 0.02 and sides[:, 1, 0].abs().max() < 0.02
    for moved, room in ((centre[:, 0], 1 - width), (centre[:, 1], 1 - height)):
        share = moved / room
        assert share.abs().max() < 1.05 and share.min() < -0.8 and share.max() > 0.8
    assert torch.corrcoef(centre.T)[0, 1].abs() < 0.4


def test_rotation_turns_by_up_to_the_angle_either_way() -> None:
    _, sides = _window(rotate=30)
    angles = torch.rad2deg(torch.atan2(sides[:, 1, 0], sides[:, 0, 0]))
    assert -31 < angles.min() < -25 and 25 < angles.max() < 31
    torch.testing.assert_close(sides[:, 1, 1], sides[:, 0, 0], atol=0.03, rtol=0)
    torch.testing.assert_close(sides[:, 0, 1], -sides[:, 1, 0], atol=0.03, rtol=0)


def test_rotation_leaves_the_centre_and_fills_the_corners() -> None:
    white = torch.full((64, 17, 17, 3), 255, dtype=torch.uint8)
    out = _apply(white, rotate=45)
    assert (out[:, 8, 8] > 254).all()
    assert (out[:, 0, 0].amax(dim=1) < 1).sum() > 20
    assert (_apply(white, rotate=45, fill="mirror") > 254).all()


def test_random_fill_is_mirror_or_one_plain_colour() -> None:
    grey = torch.full((300, 17, 17, 3), 100, dtype=torch.uint8)
    corner = _apply(grey, rotate=45, fill="random")[:, 0, 0]
    black, white = (corner < 1).all(dim=1), (corner > 254).all(dim=1)
    mirrored = (corner - 100).abs().amax(dim=1) < 1
    other = ~(black | white | mirrored)
    assert min(black.sum(), white.sum(), mirrored.sum(), other.sum()) > 20


def test_erase_blanks_a_square() -> None:
    black = torch.zeros(64, 16, 16, 3, dtype=torch.uint8)
    share = (_apply(black, erase=0.5) == 127.5).float().mean(dim=(1, 2, 3))
    assert share.max() == 0.25 and share.min() >= 0.0625
    grey = _apply(black + 127, erase=0.5, erase_fill="black")
    assert torch.equal((grey == 0).float().mean(dim=(1, 2, 3)), share) and set(grey.unique().tolist()) == {0, 127}


def test_the_blanked_square_lies_anywhere_and_is_cut_off_at_the_border() -> None:
    blank = _apply(torch.zeros(2000, 16, 16, 3, dtype=torch.uint8), erase=0.5)[..., 0] == 127.5
    rows, columns = blank.any(dim=2), blank.any(dim=1)
    # Its centre is uniform: position i is covered if the centre lies within 4 of i + 0.5.
    position = torch.arange(16) + 0.5
    expected = ((position + 4).clamp_max(16) - (position - 4).clamp_min(0)) / 16
    for covered in (rows, columns):
        torch.testing.assert_close(covered.float().mean(dim=0), expected, atol=0.05, rtol=0)
    assert torch.equal(blank, rows[:, :, None] & columns[:, None, :])
    assert torch.corrcoef(torch.stack([rows[:, 0], columns[:, 0]]).float())[0, 1].abs() < 0.1


def test_colour_by_hand() -> None:
    # Two greys and a red: brightness scales all, contrast the distance from the mean, saturation that from grey.
    image = torch.tensor([[[100, 100, 100], [60, 60, 60]], [[60, 60, 60], [110, 50, 50]]], dtype=torch.uint8)
    out = _apply(image.expand(500, 2, 2, 3), colour=0.4)
    mean, step = out.mean(dim=(1, 2, 3)), (out[:, 0, 0] - out[:, 0, 1]).mean(dim=1)
    chroma = out[:, 1, 1, 0] - out[:, 1, 1, 1]
    brightness = mean / image.float().mean()
    contrast = step / 40 / brightness
    saturation = chroma / 60 / (brightness * contrast)
    for found in (brightness, contrast, saturation):
        assert 0.59 < found.min() < 0.63 and 1.37 < found.max() < 1.41
    assert torch.corrcoef(torch.stack([brightness, contrast, saturation])).triu(1).abs().max() < 0.15


def test_colour_keeps_the_range() -> None:
    out = _apply(colour=0.4)
    assert out.min() >= 0 and out.max() <= 255
    assert not torch.equal(out, IMAGES.float())


@pytest.mark.parametrize("seed", [0, 1])
def test_the_generator_decides_everything(seed: int) -> None:
    settings: dict[str, Any] = {"flip": True, "area": [0.5, 1], "aspect": [0.7, 1.4], "rotate": 20, "fill": "random"}
    settings |= {"erase": 0.3, "colour": 0.2}
    assert torch.equal(_apply(seed=seed, **settings), _apply(seed=seed, **settings))
    assert not torch.equal(_apply(seed=seed, **settings), _apply(seed=seed + 1, **settings))


def test_a_policy_works_between_geometry_and_erasing() -> None:
    plain, changed = _apply(flip=True), _apply(flip=True, policy="autoaugment-cifar10")
    assert changed.min() >= 0 and changed.max() <= 255 and torch.equal(changed, changed.round())
    same = (plain.round() == changed).flatten(1).all(dim=1).float().mean()
    assert 0 < same < 0.5
    blanked = (_apply(policy="autoaugment-cifar10", erase=0.5) == 127.5).flatten(1).any(dim=1)
    assert blanked.all()


def test_no_draw_for_an_image_tells_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a first batch, where streams of one seed would run side by side."""
    drawn: list[Tensor] = []

    def kept(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            drawn.append(draw(*args, **kwargs))
            return drawn[-1]

        return call

    monkeypatch.setattr(torch, "rand", kept(torch.rand))
    monkeypatch.setattr(torch, "randint", kept(torch.randint))
    _apply(IMAGES.repeat(32, 1, 1, 1), area=[0.5, 1], aspect=[0.7, 1.4], rotate=20, policy="autoaugment-imagenet")
    between = torch.corrcoef(torch.stack([draw.double() for draw in drawn])).fill_diagonal_(0)
    assert len(between) > 8 and between.abs().max() < 0.15


def test_images_that_are_cropped_already_are_not_cropped_again() -> None:
    generator = torch.Generator().manual_seed(0)
    augment = Augment(AugmentConfig(area=(0.2, 0.3), aspect=(0.5, 2.0)), generator)
    assert torch.equal(augment(IMAGES, cropped=True), IMAGES.float())
    assert not torch.equal(augment(IMAGES), IMAGES.float())
