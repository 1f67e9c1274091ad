import pytest
import torch
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, TrivialAugmentWide

from camcal.training.data.operations import NAMES
from camcal.training.data.policies import CIFAR10, IMAGENET, SIGNED, TRIVIAL, PolicyAugment, Step, magnitudes
from camcal.training.recipe import Policy

THEIRS = [
    "ShearX ShearY TranslateX TranslateY Rotate Brightness Color Contrast Sharpness",
    "Posterize Solarize AutoContrast Equalize Invert Identity",
]
NAME_OF = dict(zip(" ".join(THEIRS).split(), NAMES, strict=True))


@pytest.mark.parametrize(
    ("ours", "theirs"), [(CIFAR10, AutoAugmentPolicy.CIFAR10), (IMAGENET, AutoAugmentPolicy.IMAGENET)]
)
def test_the_sub_policies_are_the_published_ones(
    ours: tuple[tuple[Step, Step], ...], theirs: AutoAugmentPolicy
) -> None:
    published = AutoAugment(theirs).policies
    assert [[(NAME_OF[n], p, m or 0) for n, p, m in pair] for pair in published] == [list(pair) for pair in ours]


@pytest.mark.parametrize("wide", [False, True])
def test_the_magnitudes_are_the_published_ones(wide: bool) -> None:
    space = TrivialAugmentWide()._augmentation_space(31) if wide else AutoAugment()._augmentation_space(10, (32, 32))
    table = magnitudes(32, wide)
    for theirs, (values, signed) in space.items():
        row = NAMES.index(NAME_OF[theirs])
        torch.testing.assert_close(table[row], values.expand(table.shape[1]).float())
        assert signed == (row < SIGNED)
    assert {NAME_OF[name] for name in TrivialAugmentWide()._augmentation_space(31)} == set(TRIVIAL)


def _draw(policy: Policy, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return PolicyAugment(policy, torch.Generator().manual_seed(0)).draw(count, 32)


def test_autoaugment_draws_each_step_as_often_as_the_policy_says() -> None:
    count = 100_000
    for step, (kinds, drawn) in enumerate(_draw("autoaugment-cifar10", count)):
        for name in NAMES[:-1]:
            expected = sum(pair[step][1] for pair in CIFAR10 if pair[step][0] == name) / len(CIFAR10)
            assert (kinds == NAMES.index(name)).float().mean() == pytest.approx(expected, abs=0.006)
        rotated = drawn[kinds == NAMES.index("rotate")]
        if len(rotated):
            assert rotated.abs().unique() == pytest.approx(30 * 2 / 9)
            assert (rotated > 0).float().mean() == pytest.approx(0.5, abs=0.03)


def test_trivialaugment_draws_operations_and_magnitudes_evenly() -> None:
    ((kinds, drawn),) = _draw("trivialaugment", 50_000)
    shares = kinds.bincount(minlength=len(NAMES)) / 50_000
    assert shares[NAMES.index("invert")] == 0
    assert (shares[torch.tensor([NAMES.index(n) for n in TRIVIAL])] - 1 / 14).abs().max() < 0.006
    shears = drawn[kinds == NAMES.index("shear_x")]
    assert len(shears.abs().unique()) == 31 and shears.max() == -shears.min() == pytest.approx(0.99)
    for name in TRIVIAL:
        signs = drawn[kinds == NAMES.index(name)].sign()
        assert (signs < 0).any() == (NAMES.index(name) < SIGNED)


@pytest.mark.parametrize("policy", ["autoaugment-cifar10", "autoaugment-imagenet", "trivialaugment"])
def test_a_policy_changes_images_and_its_generator_decides_how(policy: Policy) -> None:
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first, again, other = (PolicyAugment(policy, torch.Generator().manual_seed(s))(images) for s in (1, 1, 2))
    assert first.dtype == torch.uint8 and first.shape == images.shape
    assert torch.equal(first, again) and not torch.equal(first, other)
    unchanged = (first == images).flatten(1).all(dim=1).float().mean()
    assert 0.02 < unchanged < 0.6
